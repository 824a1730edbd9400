"""Bottlenecks of the adapters library: serial, of the residual stream, parallel, and Compacter's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from deltatune.checkpoint.adapters.content import AFTER_THE_NORM, Content, architectures
from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.foreign_files import Fields
from deltatune.checkpoint.foreign_shapes import (
    activation,
    dense,
    factors,
    one_reduction,
    products,
)
from deltatune.errors import CheckpointError, Unsupported
from deltatune.methods.addition.adapter import Adapter
from deltatune.methods.addition.bottleneck import Activation
from deltatune.methods.addition.compacter import Compacter
from deltatune.methods.addition.pfeiffer_adapter import PfeifferAdapter
from deltatune.methods.addition.phm_adapter import PHMAdapter
from deltatune.methods.addition.scaled_parallel_adapter import ScaledParallelAdapter
from deltatune.structure.site import Site


@architectures.register("bottleneck")
def read_bottleneck(content: Content) -> list[Part]:
    """A bottleneck behind, or beside, a sub-layer: serial, parallel, or Compacter's."""
    fields = content.fields
    fields.take("leave_out", [])
    fields.refuse("use_gating")
    for field in ("ln_before", "ln_after"):
        fields.refuse(field)
    fields.refuse("inv_adapter", why="an invertible adapter is a delta of its own here")
    if not fields.take("original_ln_after", True):
        raise Unsupported(
            f"`{fields.file}` has original_ln_after = False, which leaves the sub-layer's own residual out. Train it anew here."
        )
    fields.take("adapter_residual_before_ln", False)
    fields.only_trains("stochastic_depth")
    fields.only_trains("dropout")
    fields.take("reduction_factor", 16.0, int, float, dict)
    read = _reading(fields)
    found = content.modules("adapters")
    content.tensors.need(found, "adapter")
    return [read(content, found, activation(fields.take("non_linearity", "relu"), fields.file))]


def _reading(fields: Fields) -> Callable[[Content, dict[str, dict[str, Tensor]], Activation], Part]:
    """What reads this form of bottleneck."""
    products, parallel = fields.take("phm_layer", False), fields.take("is_parallel", False)
    behind_norm, residual = fields.take("original_ln_before", False), fields.take("residual_before_ln", True, bool, str)
    if behind_norm and (products or parallel or residual is not True):
        raise Unsupported(
            f"`{fields.file}` has original_ln_before = True with phm_layer = {products}, is_parallel = {parallel} and residual_before_ln = "
            f"{residual}; of bottlenecks that read the residual stream deltatune has the plain one alone. Train it anew here."
        )
    if behind_norm:
        return _read_of_stream
    if products and parallel:
        raise Unsupported(f"`{fields.file}` has phm_layer with is_parallel = True, which our Compacter lacks. Train it anew here.")
    return _read_products if products else _read_parallel if parallel else _read_serial


def _plain(content: Content) -> None:
    """Compacter's fields say nothing of a plain bottleneck."""
    for field in PRODUCTS:
        content.fields.take(field, None, object, bool)


PRODUCTS = ("phm_dim", "phm_rank", "phm_bias", "learn_phm", "shared_phm_rule", "factorized_phm_rule", "shared_W_phm", "factorized_phm_W")
NAMES = {"adapter_down.0.weight": 2, "adapter_down.0.bias": 1, "adapter_up.weight": 2, "adapter_up.bias": 1}


def _picked(content: Content, path: str, group: dict[str, Tensor], scale: Tensor | float) -> tuple[Site, list[Tensor], Tensor | float]:
    """Site, tensors and scale of one plain bottleneck; a trained scale stands in the file."""
    learned = group.pop("scaling", None)
    return content.behind(path), content.tensors.pick(group, path, NAMES), scale if learned is None else learned


def _scale(content: Content) -> float:
    """The constant scale; 1 where it is trained, as each bottleneck has its own then."""
    scaling = content.fields.take("scaling", 1.0, int, float, str)
    return 1.0 if isinstance(scaling, str) else float(scaling)


def _width(group: Mapping[str, Tensor]) -> int:
    return next((len(tensor) for name, tensor in group.items() if name == "adapter_down.0.bias"), 0)


def _one_width(content: Content, found: Mapping[str, Mapping[str, Tensor]]) -> int:
    widths = {_width(group) for group in found.values()}
    if len(widths) != 1 or 0 in widths:
        raise Unsupported(f"`{content.tensors.file}` has bottlenecks of the widths {sorted(widths)}; ours have one. Train it anew here.")
    return widths.pop()


def _read_serial(content: Content, found: dict[str, dict[str, Tensor]], f: Activation) -> Part:
    """h + s U f(D h) behind the sub-layer, with s written into U."""
    scale = _constant_scale(content, found)
    method = Adapter(_one_width(content, found), f)
    tensors = {}
    for path, group in found.items():
        site, picked, s = _picked(content, path, group, scale)
        for name, tensor in dense(picked, s).items():
            tensors[site.key, name] = tensor
    return Part("adapter", method, tensors)


def _constant_scale(content: Content, found: Mapping[str, Mapping[str, Tensor]]) -> float:
    """The scale that goes into U: then it does not train on as it did."""
    _plain(content)
    scale = _scale(content)
    if scale != 1.0 or any("scaling" in group for group in found.values()):
        content.fields.lenient.append(f"scaling = {scale}")
    return scale


def _read_of_stream(content: Content, found: dict[str, dict[str, Tensor]], f: Activation) -> Part:
    """N(s + U f(D N(s))) of the residual stream s, where a norm N is behind it; elsewhere s + U f(D s): Pfeiffer's."""
    scale = _constant_scale(content, found)
    tensors, sizes = {}, []
    for path, group in found.items():
        behind, picked, learned = _picked(content, path, group, scale)
        site = content.stream(behind)
        sizes.append((behind.out_features, len(picked[1])))
        for name, tensor in dense(picked, learned).items():
            tensors[site.key, name] = tensor
    return Part("adapter", PfeifferAdapter(one_reduction(sizes), f), tensors)


def _read_parallel(content: Content, found: dict[str, dict[str, Tensor]], f: Activation) -> Part:
    """h + s U f(D x) beside the sub-layer, x its residual."""
    _plain(content)
    if content.model_type not in AFTER_THE_NORM:
        raise Unsupported(
            f"`{content.fields.file}` has is_parallel = True for a `{content.model_type}`, where the library's bottleneck reads the "
            "residual ahead of the norm; deltatune's reads what the sub-layer is given, behind it. Train anew: scaled-parallel-adapter."
        )
    scale = _scale(content)
    learned = any("scaling" in group for group in found.values())
    if learned:
        content.fields.lenient.append("scaling, which trains")
    method = ScaledParallelAdapter(_one_width(content, found), scale, f)
    tensors = {}
    for path, group in found.items():
        site, picked, s = _picked(content, path, group, 1.0)
        for name, tensor in dense(picked, s).items():
            tensors[site.key, name] = tensor
    return Part("parallel", method, tensors)


def _read_products(content: Content, found: dict[str, dict[str, Tensor]], f: Activation) -> Part:
    """Compacter: maps sum_i A_i (x) (l_i r_i), with one rule A for all of them, or one for each."""
    fields = content.fields
    for field in ("factorized_phm_rule", "shared_W_phm"):
        fields.refuse(field)
    n, rank, shared = fields.take("phm_dim", 4), fields.take("phm_rank", 1), fields.take("shared_phm_rule", True)
    for field in ("phm_bias", "learn_phm"):
        if not fields.take(field, True):
            raise Unsupported(f"`{fields.file}` has {field} = False, which our adapters lack. Train it anew here.")
    if not fields.take("factorized_phm_W", True):
        raise Unsupported(f"`{fields.file}` has factorized_phm_W = False, which our Compacter lacks. Train it anew here: phm-adapter.")
    if _scale(content) != 1.0:
        raise Unsupported(f"`{fields.file}` has a scaling that is not 1, which our Compacter lacks. Train it anew here.")
    read = _read_shared_rule if shared else _read_own_rules
    return read(content, found, n, rank, f)


def _maps(content: Content, path: str, group: Mapping[str, Tensor], extra: Mapping[str, int]) -> dict[str, list[Tensor]]:
    """The tensors of both maps of a Compacter's bottleneck."""
    maps = {}
    for side, theirs in (("D", "adapter_down.0"), ("U", "adapter_up")):
        own = {name.removeprefix(f"{theirs}."): tensor for name, tensor in group.items() if name.startswith(f"{theirs}.")}
        maps[side] = content.tensors.pick(own, f"{path}.{theirs}", {**extra, "W_left": 3, "W_right": 3, "b": 1})
    content.tensors.pick(
        {name: tensor for name, tensor in group.items() if not name.startswith(("adapter_down.0.", "adapter_up."))}, path, {}
    )
    return maps


def _read_shared_rule(content: Content, found: dict[str, dict[str, Tensor]], n: int, rank: int, f: Activation) -> Part:
    rules = [group for group in content.modules("shared_parameters").values() if "phm_rule" in group]
    if len(rules) != 1:
        raise CheckpointError(
            f"`{content.tensors.file}` lacks `shared_parameters.{content.name}.phm_rule`, without which its factors mean nothing: the "
            "library leaves it out for models that are their own base, such as T5. Save it from the trained model with its rule."
        )
    [rule] = content.tensors.pick(rules[0], "shared_parameters", {"phm_rule": 3})
    tensors, sizes = {}, []
    for path, group in found.items():
        site, maps = content.behind(path), _maps(content, path, group, {})
        sizes.append((site.out_features, len(maps["D"][2])))
        for side, picked in maps.items():
            for name, tensor in factors(side, *picked).items():
                tensors[site.key, name] = tensor
    return Part("compacter", Compacter(n, one_reduction(sizes, n), rank, f), tensors, shared={"A": rule.mT})


def _read_own_rules(content: Content, found: dict[str, dict[str, Tensor]], n: int, rank: int, f: Activation) -> Part:
    content.fields.lenient.append(f"phm_rank = {rank} with a rule of its own for every map")
    tensors, sizes = {}, []
    for path, group in found.items():
        site, maps = content.behind(path), _maps(content, path, group, {"phm_rule": 3})
        sizes.append((site.out_features, len(maps["D"][3])))
        for side, picked in maps.items():
            for name, tensor in products(side, *picked).items():
                tensors[site.key, name] = tensor
    return Part("compacter", PHMAdapter(n, one_reduction(sizes, n), f), tensors)
