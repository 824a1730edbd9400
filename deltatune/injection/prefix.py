"""How prefix patches run: K <- [P_k; K] and V <- [P_v; V] inside an attention module.

The keys and values of an attention exist only within its forward, behind the key-value cache, so a prefix enters where
transformers lets one in: the attention implementation (``injection.attention``). The *switch* of a backbone puts
that in place while any prefix is attached. It works on copies of the configs, because the setting would reach every
model that shares a config object, and it names the plain implementation again whenever no prefix acts, so that a
disabled prefix leaves bit-identical outputs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.injection.attention import MARK, PAST, has_variant, is_on_interface, register
from deltatune.injection.positions import Shift
from deltatune.injection.slot import Act, Term, first_input, forget_compiled, slot_of, thread_key
from deltatune.methods.kinds import ConditionalPrefixPatch, Patch, PrefixPatch
from deltatune.structure.index import Index
from deltatune.structure.site import Site


class PrefixAct(Act):
    """Holds the prefixes of one attention; ``injection.attention.attend`` reads them.

    Attributes:
        length: number of virtual tokens that act.
        switch: the backbone's switch; None until ``Switch.join``.
        relative: the attention whose table of relative positions this stack uses; None where positions are absolute or rotary.
    """

    listens = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.patches: list[PrefixPatch | ConditionalPrefixPatch] = []
        self.length = 0
        self._inputs: dict[int, Tensor] = {}
        self.switch: Switch | None = None
        self.relative: Any = None

    @classmethod
    def check(cls, index: Index, site: Site, patch: Patch) -> None:
        """Refuse an attention that a prefix cannot enter."""
        check_prefix(site, index)

    def join(self, around: dict[str, Any], backbone: nn.Module, index: Index, site: Site) -> None:
        """Enter the backbone's switch, made with the first prefix."""
        if "switch" not in around:
            around["switch"] = Switch(backbone, index)
        around["switch"].join(site)

    def leave(self, around: dict[str, Any]) -> None:
        """Leave the switch, which undoes everything with the last prefix."""
        switch = around.get("switch")  # none where the first prefix failed to join
        if switch is not None and switch.leave():
            del around["switch"]

    def arrange(self, module: nn.Module, terms: Sequence[Term], gates: nn.ModuleDict) -> None:
        """Concatenate the prefixes in the order of the terms."""
        acted = bool(self.length)
        names = [name for term in terms for name in term.members]
        patches = [member.patch for name in names for member in self.members.get(name, [])]
        self.patches = [patch for patch in patches if isinstance(patch, PrefixPatch | ConditionalPrefixPatch)]
        with torch.no_grad():
            self.length = sum(_length(patch) for patch in self.patches)
        if self.switch is not None and bool(self.length) != acted:
            self.switch.count(1 if self.length else -1)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check that ``attend`` will run, and tell it how many tokens are cached where positions are relative.

        Raises:
            Unsupported: the attention implementation was changed behind our back, so the prefix would be ignored.
        """
        if not self.length:
            return args, kwargs
        config: Any = module.config
        name = config._attn_implementation
        if not name.startswith(MARK):
            raise Unsupported(
                f"The attention implementation of {type(module).__name__} was set to `{name}` while prefixes act in it, so they would be "
                "ignored. Detach them, set the implementation, and attach or load them again."
            )
        if any(isinstance(patch, ConditionalPrefixPatch) for patch in self.patches):
            self._inputs[thread_key()] = first_input(args, kwargs)
        if self.relative is None or kwargs.get("key_value_states") is not None:
            return args, kwargs
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length(module.layer_idx)
        return args, {**kwargs, PAST: past.clone() if isinstance(past, Tensor) else past}  # a static cache counts in place

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output as it is; what the prefixes read is let go."""
        self._inputs.pop(thread_key(), None)
        return output

    def prefix(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """P_k and P_v of all acting patches.

        Args:
            key: (batch, key_value_heads, keys, head_dim).
            value: like key.

        Returns:
            Two tensors (batch, key_value_heads, length, head_dim) of key's and value's dtype.

        Raises:
            Unsupported: the keys have another shape than the patches were built for.
        """
        pairs = [patch(self._inputs[thread_key()]) if isinstance(patch, ConditionalPrefixPatch) else patch() for patch in self.patches]
        return torch.cat([_rows(k, key) for k, _ in pairs], dim=2), torch.cat([_rows(v, value) for _, v in pairs], dim=2)

    def bias_columns(self, position_bias: Tensor, query: Tensor, key: Tensor, past: int | Tensor | None) -> Tensor:
        """Bias of the virtual keys, at the relative positions -length to -1 before the text: (1, heads, queries, length).

        Args:
            position_bias: (1, heads, queries, keys), of the text.
            query: (batch, heads, queries, head_dim).
            key: (batch, heads, keys, head_dim).
            past: number of cached tokens; None in cross-attention, where positions have no bias.
        """
        if self.relative is None or past is None:
            return position_bias.new_zeros(()).expand(*position_bias.shape[:-1], self.length)
        columns: Tensor = self.relative.compute_bias(query.shape[2], self.length, device=key.device, past_seen_tokens=past + self.length)
        return columns.to(position_bias.dtype)


def _length(patch: PrefixPatch | ConditionalPrefixPatch) -> int:
    return patch.num_virtual_tokens if isinstance(patch, ConditionalPrefixPatch) else int(patch()[0].shape[-2])


def _rows(virtual: Tensor, text: Tensor) -> Tensor:
    """Virtual keys or values ([batch,] heads, length, head_dim) for every row of those of the text (batch, heads, keys, head_dim)."""
    heads, _, head_dim = virtual.shape[-3:]
    if (heads, head_dim) != (text.shape[1], text.shape[3]):
        raise Unsupported(
            f"A prefix of {heads} heads of width {head_dim} was asked to join keys or values of {text.shape[1]} heads "
            f"of width {text.shape[3]}. This attention does not keep its keys per head; choose another method for it, such as LoRA."
        )
    return virtual.to(text).expand(text.shape[0], -1, -1, -1)


@dataclass
class Copied:
    """A config that was replaced by a copy of itself.

    Attributes:
        original: the object that was there.
        copy: what stands in its place.
        before: the copy's values when it was made; what a user sets meanwhile is carried over to the original.
        holders: the modules that hold it, each with the name of the attribute.
        plain: the implementation it asks for without prefixes; None where nothing has to be switched.
    """

    original: Any
    copy: Any
    before: dict[str, Any]
    holders: list[tuple[nn.Module, str]]
    plain: str | None = None

    def switch_from(self, implementation: str | None) -> str | None:
        """Make it switch between ``implementation`` and its variant; None where that has no variant."""
        if has_variant(implementation):
            self.plain = implementation
        return self.plain

    def set(self, acting: bool) -> None:
        """Name the implementation the attention runs from now on."""
        if self.plain is not None:
            self.copy._attn_implementation_internal = MARK + self.plain if acting else self.plain

    def restore(self) -> None:
        """Put the original back, with what was set on the copy meanwhile."""
        from transformers import PreTrainedConfig

        self.set(False)
        for name, value in vars(self.copy).items():
            if not isinstance(value, PreTrainedConfig) and (name not in self.before or self.before[name] != value):
                self.original.__dict__[name] = value
        for module, name in self.holders:
            if module.__dict__.get(name) is self.copy:
                module.__dict__[name] = self.original


class Switch:
    """What a backbone needs as a whole while prefixes are attached to it.

    Args:
        backbone: the model.
        index: its index.

    Raises:
        Unsupported: a module whose positions must be shifted receives no position ids.
    """

    def __init__(self, backbone: nn.Module, index: Index) -> None:
        attentions = [site for site in index.sites if site.leaf in ("attention", "cross_attention")]
        self._acting = 0
        self._acts: list[PrefixAct] = []
        self._stack_of = {site.path: stack.site.path for stack in index.stacks for site in stack.attentions}
        self._relative: dict[str | None, nn.Module] = {}
        for site in attentions:
            if _has_table(site.module):
                self._relative.setdefault(self._stack_of.get(site.path), site.module)
        self._shifts: dict[str | None, list[Shift]] = {
            stack.site.path: [Shift(site.module, site.path) for site in stack.positions] for stack in index.stacks
        }
        self._copied = _copy_configs(backbone)
        held = {id(item.copy): item for item in self._copied}
        self._variants: set[tuple[str, type[nn.Module]]] = set()
        for site in attentions:
            if is_on_interface(site.module):
                config: Any = site.module.config
                implementation = held[id(config)].switch_from(config._attn_implementation)
                self._variants |= {(implementation, type(site.module))} if implementation else set()
        self._register()
        for stack in index.stacks:
            for site, shift in zip(stack.positions, self._shifts[stack.site.path], strict=True):
                shift.listen(site.module)
        forget_compiled()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._register()  # a fresh process does not know the variants yet

    def _register(self) -> None:
        for implementation, kind in self._variants:
            register(implementation, kind)

    def join(self, site: Site) -> None:
        """Take in the act of an attention."""
        slot = slot_of(site.module)
        act = slot.acts["PrefixAct"] if slot is not None else None
        assert isinstance(act, PrefixAct)
        if act in self._acts:
            return
        act.switch = self
        self._acts.append(act)
        stack = self._stack_of.get(site.path)
        if _has_table(site.module):
            act.relative = site.module
        if site.leaf != "cross_attention":
            act.relative = act.relative or self._relative.get(stack)
            for shift in self._shifts.get(stack, []):
                shift.acts.append(act)
        if act.length:
            self.count(1)

    def leave(self) -> bool:
        """Forget the acts that lost their last prefix; without any left, undo everything and return True."""
        self._acts = [act for act in self._acts if act.members]
        for shift in self._all_shifts():
            shift.acts = [act for act in shift.acts if act in self._acts]
        if self._acts:
            return False
        for shift in self._all_shifts():
            shift.remove()
        for item in self._copied:
            item.restore()
        forget_compiled()
        return True

    def _all_shifts(self) -> list[Shift]:
        return [shift for shifts in self._shifts.values() for shift in shifts]

    def count(self, change: int) -> None:
        """One more or one fewer attention has acting prefixes."""
        self._acting += change
        for item in self._copied:
            item.set(self._acting > 0)


def check_prefix(site: Site, index: Index) -> None:
    """Refuse an attention that a prefix cannot enter.

    Raises:
        Unsupported: it does not run on transformers' attention interface, or with an implementation that has no variant, its keys are not
            kept per head, or the positions of its stack cannot be shifted.
    """
    module, kind = site.module, type(site.module).__name__
    if not is_on_interface(module):
        raise Unsupported(
            f"A prefix was asked for at `{site.path}` ({kind}), which does not run on transformers' attention interface, "
            "so virtual keys and values cannot enter it. Choose another method for this backbone, such as PromptTuning or LoRA."
        )
    if hasattr(module, "kv_lora_rank"):
        raise Unsupported(
            f"A prefix was asked for at `{site.path}` ({kind}), which keeps one compressed key for all heads. "
            "Choose another method for this backbone, such as PromptTuning or LoRA."
        )
    config: Any = module.config
    name = str(config._attn_implementation).removeprefix(MARK)
    if not has_variant(name):
        raise Unsupported(
            f"A prefix was asked for at `{site.path}` ({kind}), whose attention implementation is `{name}`. "
            "Load the backbone with attn_implementation='sdpa' or 'eager'."
        )
    if name == "eager" and getattr(config, "reorder_and_upcast_attn", False):
        raise Unsupported(
            f"A prefix was asked for at `{site.path}` ({kind}), which runs its own attention under `reorder_and_upcast_attn`. "
            "Load the backbone with attn_implementation='sdpa'."
        )
    if _has_table(module) and "past_seen_tokens" not in inspect.signature(module.compute_bias).parameters:  # type: ignore[arg-type]
        raise Unsupported(
            f"A prefix was asked for at `{site.path}` ({kind}), whose relative positions cannot be computed for virtual keys. "
            "Choose another method for this backbone, such as LoRA."
        )
    for stack in index.stacks:
        if any(other.module is module for other in stack.attentions):
            for position in stack.positions:
                Shift(position.module, position.path)


def _has_table(module: nn.Module) -> bool:
    """The attention has its own table of relative positions, as T5's first blocks."""
    return isinstance(getattr(module, "relative_attention_bias", None), nn.Module) and hasattr(module, "compute_bias")


def _copy_configs(backbone: nn.Module) -> list[Copied]:
    from transformers import PreTrainedConfig

    copies: dict[int, Copied] = {}
    memo: dict[int, Any] = {}
    for module in backbone.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                if id(value) not in copies:
                    stand_in = copy.deepcopy(value, memo)  # one memo, so that a config inside a config is copied once
                    before = {k: copy.deepcopy(v) for k, v in vars(stand_in).items() if not isinstance(v, PreTrainedConfig)}
                    copies[id(value)] = Copied(value, stand_in, before, [])
                copies[id(value)].holders.append((module, name))
    for item in copies.values():
        for module, name in item.holders:
            module.__dict__[name] = item.copy
    return list(copies.values())
