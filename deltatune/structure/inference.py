"""Roles of an architecture no file describes, inferred from module names, classes, shapes and signatures.

Attentions are found first, by their projections; the layers are the numbered modules around them; what is linear in a
layer and no part of an attention is its feed-forward. What fits no rule gets no role: a site without a role can still
be named by its path, a wrong role would adapt the wrong matrix.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from deltatune.structure.anatomy import Anatomy, StackPaths, has_own_parameters, has_parameters, output_rows
from deltatune.structure.rows import RULES, Heads, heads_of


def _spellings(*stems: str) -> frozenset[str]:
    """The ways in which projections are spelt: ``q``, ``q_proj``, ``to_q``, ``wq``..."""
    forms = (
        "{}",
        "{}_proj",
        "{}proj",
        "{}_lin",
        "{}_linear",
        "{}_layer",
        "{}_net",
        "w{}",
        "w_{}",
        "to_{}",
        "linear_{}",
        "lin_{}",
        "{}_attn",
    )
    return frozenset(form.format(stem) for form in forms for stem in stems)


QUERY, KEY, VALUE = _spellings("q", "query"), _spellings("k", "key"), _spellings("v", "value")
OUTPUT = _spellings("o", "out", "output") | {"dense", "c_proj", "proj", "projection"}
FUSED = frozenset({"qkv", "qkv_proj", "to_qkv", "wqkv", "c_attn", "att_proj", "in_proj", "w_pack", "query_key_value"})
GATE = frozenset({"gate_proj", "gate", "wi_0", "w_gate", "linear_gate"})
UP = frozenset(
    {"up_proj", "up", "fc1", "fc_1", "fc_in", "lin1", "linear1", "linear_1", "wi", "wi_1", "c_fc", "dense_h_to_4h", "w_up", "ffn_1"}
)
DOWN = frozenset(
    {"down_proj", "down", "fc2", "fc_2", "fc_out", "lin2", "linear2", "linear_2", "wo", "c_proj", "dense_4h_to_h", "w_down", "ffn_2"}
)
CROSS = re.compile(r"cross|enc_?dec|encoder_attn|multihead_attn|src_attn|enc_attn", re.IGNORECASE)
READOUT = frozenset({"classifier", "score", "qa_outputs", "classification_head", "pre_classifier", "logits_proj"})
POOLERS = frozenset({"pooler", "sequence_summary"})
LINEAR_READOUT = frozenset({"fc", "head"})
LM_HEAD = frozenset({"lm_head", "embed_out", "output_projection"})
POSITION = re.compile(r"pos(ition)?|wpe", re.IGNORECASE)
NO_TOKEN = re.compile(r"type|segment|relative|rel_|bias|lang", re.IGNORECASE)

INTERLEAVED = frozenset({"query_key_value"})
INTERLEAVED_CLASSES = re.compile(r"GPTBigCode")
UNKNOWN_LAYOUT = re.compile(r"CodeGen|Lightning|Disentangled")
"""Classes whose fused projection has the name of another layout: interleaved all the same, or no roles rather than wrong ones."""
LAYER_LISTS = frozenset({"layers", "layer", "h", "block", "blocks"})
FEED_FORWARD = re.compile(r"(^|[._])(mlp|ffn?|feed_?forward|experts?|moe|shared_experts?)([._]|$)", re.IGNORECASE)

Modules = Mapping[str, nn.Module]


def infer(modules: Modules, anatomy: Anatomy) -> None:
    """Enter the roles of ``modules`` (path -> module, in module order) into ``anatomy``."""
    attentions = [path for path in modules if _attention(path, modules, anatomy)]
    layers = _layers(attentions, modules, anatomy)
    for attention in attentions:
        if isinstance(modules[attention], nn.MultiheadAttention):
            continue
        layer = _enclosing(attention, layers)
        output = _output(attention, layer, modules, anatomy)
        if output is not None:
            anatomy.add(output, f"{_kind(attention, layer, modules)}.output")
    _name_attentions(attentions, layers, modules, anatomy)
    for layer in layers:
        _feed_forward(layer, attentions, modules, anatomy)
    _output_embeddings(modules, anatomy)
    for path, module in modules.items():
        _single(path, module, layers, modules, anatomy)
    _stacks(layers, modules, anatomy)
    _poolers(modules, anatomy)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear map: ``nn.Linear``, ``Conv1D`` of transformers, or a quantised layer of that form."""
    sizes = (
        getattr(module, "in_features", None) or getattr(module, "nx", None),
        getattr(module, "out_features", None) or getattr(module, "nf", None),
    )
    return all(isinstance(size, int) for size in sizes)


def _in(module: nn.Module) -> int:
    return int(getattr(module, "in_features", None) or module.nx)  # type: ignore[arg-type]


def _out(module: nn.Module) -> int:
    return int(getattr(module, "out_features", None) or module.nf)  # type: ignore[arg-type]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _below(path: str, modules: Modules) -> Iterator[str]:
    """Paths strictly below ``path``."""
    prefix = f"{path}." if path else ""
    return (other for other in modules if other.startswith(prefix) and other != path)


def _linear_children(path: str, modules: Modules) -> dict[str, str]:
    """Lower-case name -> path of the linear maps directly below ``path``."""
    children = {name: _join(path, name) for name in modules[path]._modules}
    return {name.lower(): child for name, child in children.items() if child in modules and is_linear(modules[child])}


# --- attentions -----------------------------------------------------------------------------------------------------


def _attention(path: str, modules: Modules, anatomy: Anatomy) -> bool:
    """Whether the module at ``path`` projects to queries, keys and values; enters these, still as self-attention."""
    module = modules[path]
    if isinstance(module, nn.MultiheadAttention):
        _multihead(path, module, anatomy)
        return True
    children = _linear_children(path, modules)
    separate = {role: next((children[name] for name in children if name in names), None) for role, names in _SEPARATE.items()}
    if all(separate.values()):
        for role, child in separate.items():
            anatomy.add(str(child), f"attention.{role}")
        return True
    fused = next((name for name in children if name in FUSED), None)
    if fused is None or not _is_fused_attention(fused, modules[children[fused]], module):
        return False
    heads = heads_of(module)
    rule = _layout(fused, modules[children[fused]], module, heads)
    if rule is not None:
        rows = RULES[rule](_out(modules[children[fused]]), 3, heads or Heads(1, 1))
        for role, part in zip(_SEPARATE, rows, strict=True):
            anatomy.add(children[fused], f"attention.{role}", rows=part)
    return True


_SEPARATE = {"query": QUERY, "key": KEY, "value": VALUE}


def _multihead(path: str, module: nn.MultiheadAttention, anatomy: Anatomy) -> None:
    """``nn.MultiheadAttention`` reads [q; k; v] and the weight of ``out_proj`` itself, without calling a module."""
    if module.in_proj_weight is not None:
        for role, rows in zip(_SEPARATE, RULES["equal"](3 * module.embed_dim, 3, Heads(module.num_heads, module.num_heads)), strict=True):
            anatomy.add(path, f"attention.{role}", "in_proj_weight", rows)
    else:
        for role in _SEPARATE:
            anatomy.add(path, f"attention.{role}", f"{role[0]}_proj_weight")
    anatomy.add(path, "attention.output", "out_proj.weight")
    anatomy.unreached.add(_join(path, "out_proj"))


def _is_fused_attention(name: str, projection: nn.Module, parent: nn.Module) -> bool:
    if name == "in_proj" and "Attention" not in type(parent).__name__:  # state-space models use the name too
        return False
    return _out(projection) > _in(projection) or heads_of(parent) is not None


def _layout(name: str, projection: nn.Module, parent: nn.Module, heads: Heads | None) -> str | None:
    """Name of the rule that says how the rows of a fused [q, k, v] lie; None if that cannot be told."""
    if UNKNOWN_LAYOUT.search(type(parent).__name__):
        return None
    if heads is None:
        return "equal" if name not in INTERLEAVED and _out(projection) % 3 == 0 else None
    grouped = heads.groups != heads.query
    if name in INTERLEAVED and getattr(parent, "new_decoder_architecture", False):
        return "interleaved_groups"
    parts = heads.query + 2 * heads.groups if grouped else 3
    if _out(projection) % parts:
        return None
    if grouped:
        return "grouped"
    return "interleaved" if name in INTERLEAVED or INTERLEAVED_CLASSES.search(type(parent).__name__) else "equal"


def _output(attention: str, layer: str | None, modules: Modules, anatomy: Anatomy) -> str | None:
    """Path of the output projection: in the attention module, or alone beside it (BERT)."""
    children = {name: path for name, path in _linear_children(attention, modules).items() if path not in anatomy.assignments}
    named = next((path for name, path in children.items() if name in OUTPUT), None)
    if named is not None:
        return named
    for name in OUTPUT:  # diffusers: to_out = [Linear, Dropout]
        first = _join(_join(attention, name), "0")
        if first in modules and is_linear(modules[first]):
            return first
    parent = _parent(attention)
    if layer is None or parent == layer or not parent.startswith(f"{layer}."):
        return None
    beside = [path for path in _below(parent, modules) if is_linear(modules[path]) and not path.startswith(f"{attention}.")]
    return beside[0] if len(beside) == 1 else None


def _kind(attention: str, layer: str | None, modules: Modules) -> str:
    """``attention`` or ``cross_attention``, from the names between the layer and the attention, and its class."""
    names = attention.removeprefix(f"{layer}.") if layer is not None else _name(attention)
    return "cross_attention" if CROSS.search(names) or CROSS.search(type(modules[attention]).__name__) else "attention"


def _name_attentions(attentions: list[str], layers: list[str], modules: Modules, anatomy: Anatomy) -> None:
    """Enter the attention modules themselves, and turn the roles of cross-attentions."""
    for attention in attentions:
        kind = _kind(attention, _enclosing(attention, layers), modules)
        anatomy.add(attention, kind)
        if kind == "cross_attention":
            for path in (attention, *_linear_children(attention, modules).values()):
                anatomy.rename(path, "attention.", "cross_attention.")


# --- layers and feed-forward ----------------------------------------------------------------------------------------


def _layers(attentions: list[str], modules: Modules, anatomy: Anatomy) -> list[str]:
    """The layers: items of the innermost numbered list around an attention whose items hold a feed-forward too."""
    lists: dict[str, None] = {}
    for attention in attentions:
        numbered = [path for path in _ancestors(attention) if _name(path).isdigit() and path in modules]
        whole = next((path for path in numbered if _has_feed_forward(path, attentions, modules)), None)
        chosen = whole or next(iter(numbered), None)
        if chosen is not None:
            lists[_parent(chosen)] = None
    for path in modules:  # layers without an attention that is told by its projections: state spaces, latent attention, convolutions
        if isinstance(modules[path], nn.ModuleList) and _name(path) in LAYER_LISTS and not _overlaps(path, lists):
            lists[path] = None
    layers = {_join(path, name) for path in lists for name in modules[path]._modules if _join(path, name) in modules}
    for layer in (ordered := [path for path in modules if path in layers]):
        anatomy.add(layer, "layer")
    return ordered


def _overlaps(path: str, lists: Iterable[str]) -> bool:
    """Whether one of ``lists`` lies in ``path`` or around it."""
    return any(f"{path}.".startswith(f"{other}.") or other.startswith(f"{path}.") for other in lists)


def _ancestors(path: str) -> Iterator[str]:
    """The enclosing paths, innermost first."""
    while path := _parent(path):
        yield path


def _has_feed_forward(layer: str, attentions: list[str], modules: Modules) -> bool:
    """Whether a linear map or experts lie in ``layer`` outside the attention modules and what belongs to them."""
    inside = [path for path in attentions if path.startswith(f"{layer}.")]
    taken = {path if _parent(path) == layer else _parent(path) if _name(path) in ("self", "attn") else path for path in inside}
    taken.discard(layer)
    for path in _below(layer, modules):
        if any(f"{path}.".startswith(f"{attention}.") for attention in taken):
            continue
        if is_linear(modules[path]) or _expert_parameters(modules[path]):
            return True
    return False


def _enclosing(path: str, layers: list[str]) -> str | None:
    """The innermost of ``layers`` that contains ``path``."""
    known = set(layers)
    return next((outer for outer in _ancestors(path) if outer in known), None)


def _feed_forward(layer: str, attentions: list[str], modules: Modules, anatomy: Anatomy) -> None:
    """Enter gate, up and down of one layer, and of its experts."""
    linears = [path for path in _below(layer, modules) if is_linear(modules[path]) and path not in anatomy.assignments]
    linears = [path for path in linears if not _in_attention(path, layer, anatomy) and not _is_router(path, modules)]
    if not any(f"{path}.".startswith(f"{layer}.") for path in attentions):
        linears = [path for path in linears if FEED_FORWARD.search(path.removeprefix(layer))]
    by_shape = not any(_named(path, linears) for path in linears)
    for path in linears:
        group = "experts" if re.search(r"\.experts?\.", path.removeprefix(layer)) else "feed_forward"
        roles = _feed_forward_roles(path, linears, modules, by_shape)
        if len(roles) == 1:
            anatomy.add(path, f"{group}.{roles[0]}")
        elif roles:
            for role, rows in zip(roles, RULES["equal"](_out(modules[path]), 2, Heads(1, 1)), strict=True):
                anatomy.add(path, f"{group}.{role}", rows=rows)
    for path in _below(layer, modules):
        _experts(path, modules[path], anatomy)


def _in_attention(path: str, layer: str, anatomy: Anatomy) -> bool:
    """Whether ``path`` lies below an attention module of the layer (extra projections of an attention, ``out_proj``)."""
    for outer in _ancestors(path):
        if outer == layer:
            return False
        if any(entry.role in ("attention", "cross_attention") for entry in anatomy.assignments.get(outer, ())):
            return True
    return False


def _is_router(path: str, modules: Modules) -> bool:
    """A small linear map beside experts that chooses among them, or switches a shared one."""
    siblings = modules[_parent(path)]._modules
    chooses = _name(path) in ("gate", "router", "classifier") and any("expert" in name for name in siblings)
    return chooses or "router" in path.split(".") or _out(modules[path]) == 1


def _named(path: str, linears: list[str]) -> str | None:
    """``gate``, ``up`` or ``down``, if the name of the linear map, or of its parent, says so."""
    name = _name(path).lower()
    if name in ("w1", "w2", "w3"):
        gated = any(_parent(other) == _parent(path) and _name(other).lower() == "w3" for other in linears)
        return {"w1": "gate" if gated else "up", "w2": "down", "w3": "up"}[name]
    if name == "dense":
        return {"intermediate": "up", "output": "down"}.get(_name(_parent(path)).lower())
    return next((role for role, names in (("gate", GATE), ("up", UP), ("down", DOWN)) if name in names), None)


def _feed_forward_roles(path: str, linears: list[str], modules: Modules, by_shape: bool) -> tuple[str, ...]:
    """The roles of one linear map of a feed-forward: by its name, by its partner's width, or by its shape where nothing is named."""
    named, wide = _named(path, linears), _out(modules[path])
    partners = [other for other in linears if _parent(other) == _parent(path) and _named(other, linears) == "down"]
    if named != "down" and any(wide == 2 * _in(modules[other]) for other in partners):
        return "gate", "up"
    if named is not None:
        return (named,)
    if not by_shape or wide == _in(modules[path]):
        return ()
    return ("up",) if wide > _in(modules[path]) else ("down",)


def _expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter (expert, out, in) of experts that are fused into three-dimensional parameters."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    return {name: parameter for name, parameter in own.items() if parameter.ndim == 3 and name in _EXPERTS}


_EXPERTS = {"gate_up_proj": ("gate", "up"), "gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",)}


def _experts(path: str, module: nn.Module, anatomy: Anatomy) -> None:
    for name, parameter in _expert_parameters(module).items():
        roles = _EXPERTS[name]
        rule = "equal" if getattr(module, "is_concatenated", True) else "alternating"
        parts = RULES[rule](output_rows(module, parameter.shape), len(roles), Heads(1, 1)) if len(roles) > 1 else [None]
        for role, rows in zip(roles, parts, strict=True):
            anatomy.add(path, f"experts.{role}", name, rows)


# --- everything that stands alone -----------------------------------------------------------------------------------


def _single(path: str, module: nn.Module, layers: list[str], modules: Modules, anatomy: Anatomy) -> None:
    """Norms, embeddings, positions, heads: told by the module alone."""
    if path in anatomy.assignments:
        return
    name, kind = _name(path), type(module).__name__
    inside = _enclosing(path, layers) is not None
    if "norm" in kind.lower() and has_own_parameters(module):
        anatomy.add(path, "norm")
    elif "Rotary" in kind:
        anatomy.add(path, "position")
    elif isinstance(module, nn.Embedding):
        _embedding(path, module, modules, anatomy)
    elif name in LM_HEAD and is_linear(module):
        anatomy.add(path, "lm_head")
    elif not inside and _is_head(name, module) and not _in_readout(path, anatomy):
        anatomy.add(path, "readout")
    elif isinstance(module, nn.Conv2d) and re.search(r"patch", path, re.IGNORECASE) and not inside:
        anatomy.add(path, "embedding")


def _is_head(name: str, module: nn.Module) -> bool:
    return (name in READOUT and has_parameters(module)) or (name in LINEAR_READOUT and is_linear(module))


def _in_readout(path: str, anatomy: Anatomy) -> bool:
    return any(any(entry.role == "readout" for entry in anatomy.assignments.get(outer, ())) for outer in _ancestors(path))


def _embedding(path: str, module: nn.Embedding, modules: Modules, anatomy: Anatomy) -> None:
    name = _name(path)
    if name == "shared" and _owned_elsewhere(path, module, modules):
        anatomy.unreached.add(path)
    elif NO_TOKEN.search(name):
        return
    elif POSITION.search(name):
        anatomy.add(path, "position")
    else:
        anatomy.add(path, "embedding")


def _owned_elsewhere(path: str, module: nn.Embedding, modules: Modules) -> bool:
    others = (other for where, other in modules.items() if where != path and isinstance(other, nn.Embedding))
    return any(other.weight is module.weight for other in others)


def _stacks(layers: list[str], modules: Modules, anatomy: Anatomy) -> None:
    """A stack is the innermost module around a list of layers whose forward takes ``input_ids`` and ``inputs_embeds``."""
    for layer_list in dict.fromkeys(_parent(layer) for layer in layers):
        outer = [*_ancestors(layer_list), ""] if layer_list else []
        entry = next((path for path in outer if path in modules and _takes_tokens(modules[path])), None)
        if entry is None:
            continue
        embeddings = [path for path in anatomy.paths("embedding") if not entry or path.startswith(f"{entry}.")]
        if not embeddings:
            continue
        anatomy.add(entry, "stack")
        anatomy.stacks.append(StackPaths(entry, layer_list, embeddings[0], _inner(entry, layer_list, modules)))


def _output_embeddings(modules: Modules, anatomy: Anatomy) -> None:
    """Enter the language-model heads that the models themselves name as such."""
    heads: set[int] = set()
    for module in modules.values():
        named = getattr(module, "get_output_embeddings", None)
        head = named() if callable(named) else None
        if isinstance(head, nn.Module) and not isinstance(head, nn.Embedding):
            heads.add(id(head))
    for path, module in modules.items():
        if id(module) in heads and not anatomy.assignments.get(path):
            anatomy.add(path, "lm_head")


def _poolers(modules: Modules, anatomy: Anatomy) -> None:
    """Enter poolers that belong to a task head because they lie outside the stack (DeBERTa)."""
    stacks = [stack.entry for stack in anatomy.stacks]
    if not stacks or not anatomy.paths("readout"):
        return
    for path, module in modules.items():
        inside = any(not entry or f"{path}.".startswith(f"{entry}.") for entry in stacks)
        if _name(path) in POOLERS and not inside and has_parameters(module):
            anatomy.add(path, "readout")


def _takes_tokens(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return "input_ids" in parameters and "inputs_embeds" in parameters


def _inner(entry: str, layer_list: str, modules: Modules) -> str | None:
    """The child of a stack that holds its layers, where a pooler follows it."""
    if getattr(modules[entry], "pooler", None) is None:
        return None
    child = layer_list.removeprefix(f"{entry}.").partition(".")[0]
    return _join(entry, child)
