"""How prefix patches run: K <- [P_k; K] and V <- [P_v; V] inside an attention module.

The keys and values of an attention exist only within its forward, behind the key-value cache, so a prefix enters where
transformers lets one in: the attention implementation (``injection.attention``). The *switch* of a backbone
(``injection.variants``) puts that in place while any prefix is attached.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.injection.interface import MARK, PAST, has_table, has_variant, is_on_interface
from deltatune.injection.positions import Shift
from deltatune.injection.slot import Act, Member, Term, first_input, thread_key
from deltatune.methods.kinds import ConditionalPrefixPatch, Patch, PrefixPatch
from deltatune.structure.index import Index
from deltatune.structure.site import Site

if TYPE_CHECKING:
    from deltatune.injection.around import Around, Guest
    from deltatune.injection.rows import RowPrefixes, RowPrompts
    from deltatune.injection.variants import Switch


class PrefixAct(Act):
    """Holds the prefixes of one attention; ``injection.attention.attend`` reads them.

    Attributes:
        length: number of virtual tokens that act.
        ahead: how many of them take the positions ahead of the text.
        switch: the backbone's switch; None until ``Switch.join``.
        guest: who knows of routes; None while nothing was routed.
        number: by which it knows this act.
        relative: the attention whose table of relative positions this stack uses; None where positions are absolute or rotary.
    """

    listens = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.patches: list[PrefixPatch | ConditionalPrefixPatch] = []
        self.length, self.ahead = 0, 0
        self._lengths: dict[str, list[tuple[int, bool]]] = {}
        self._inputs: dict[int, Tensor] = {}
        self.switch: Switch | None = None
        self.relative: Any = None
        self.guest: Guest | None = None
        self.number = -1

    @property
    def rows(self) -> RowPrefixes | None:
        """The prefixes of each row, within a route."""
        return None if self.guest is None else self.guest.rows_of(self.number)

    @classmethod
    def check(cls, index: Index, site: Site, patch: Patch) -> None:
        """Refuse an attention that a prefix cannot enter."""
        check_prefix(site, index)
        if isinstance(patch, PrefixPatch) and not patch.placed:
            check_unplaced(site, index)

    def join(self, around: Around, backbone: nn.Module, index: Index, site: Site) -> None:
        """Enter the backbone's switch, made with the first prefix."""
        around.switch_of(backbone, index).join(self, site)

    def leave(self, around: Around) -> None:
        """Leave the switch, which undoes everything with the last prefix."""
        if around.switch is not None and around.switch.leave():  # none where the first prefix failed to join
            around.switch = None

    def arrange(self, module: nn.Module, terms: Sequence[Term], mixers: nn.ModuleDict) -> None:
        """Concatenate the prefixes in the order of the terms."""
        acted = bool(self.length)
        names = [name for term in terms for name in term.members]
        self.patches, self.length, self.ahead = [], 0, 0
        self._extend(names)
        if self.switch is not None and bool(self.length) != acted:
            self.switch.count(1 if self.length else -1)

    def append(self, module: nn.Module, term: Term, mixers: nn.ModuleDict) -> None:
        """Concatenate its prefixes, too."""
        acted = bool(self.length)
        self._extend(term.members)
        if self.switch is not None and self.length and not acted:
            self.switch.count(1)

    def add(self, module: nn.Module, member: Member) -> None:
        """Measure the prefix now: later its tensors may be shards."""
        super().add(module, member)
        assert isinstance(member.patch, PrefixPatch | ConditionalPrefixPatch)
        with torch.no_grad():
            placed = isinstance(member.patch, ConditionalPrefixPatch) or member.patch.placed
            self._lengths.setdefault(member.delta, []).append((_length(member.patch), placed))

    def remove(self, module: nn.Module, delta: str) -> None:
        """Forget the prefixes of one delta."""
        super().remove(module, delta)
        self._lengths.pop(delta, None)

    def _extend(self, deltas: Sequence[str]) -> None:
        for name in deltas:
            patches = [member.patch for member in self.members.get(name, [])]
            self.patches += [patch for patch in patches if isinstance(patch, PrefixPatch | ConditionalPrefixPatch)]
            for length, placed in self._lengths.get(name, []):
                self.length += length
                self.ahead += length * placed

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check that ``attend`` will run, and tell it how many tokens are cached where positions are relative.

        Raises:
            Unsupported: the attention implementation was changed behind our back, so the prefix would be ignored.
        """
        rows = self.rows
        if not self.length and rows is None:
            return args, kwargs
        config: Any = module.config
        name = config._attn_implementation
        if not name.startswith(MARK):
            raise Unsupported(
                f"The attention implementation of {type(module).__name__} was set to `{name}` while prefixes act in it, so they would be "
                "ignored. Detach them, set the implementation, and attach or load them again."
            )
        if any(isinstance(patch, ConditionalPrefixPatch) for patch in self.patches) or (rows is not None and rows.is_conditional):
            self._inputs[thread_key()] = first_input(args, kwargs, self.names)
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
        rows = self.rows
        if rows is not None:
            return rows.prefix(key, self._inputs.get(thread_key()), _rows)
        pairs = [patch(self._inputs[thread_key()]) if isinstance(patch, ConditionalPrefixPatch) else patch() for patch in self.patches]
        return torch.cat([_rows(k, key) for k, _ in pairs], dim=2), torch.cat([_rows(v, value) for _, v in pairs], dim=2)

    @property
    def columns(self) -> int:
        """How many columns of virtual keys there are now."""
        rows = self.rows
        return self.length if rows is None else rows.length

    def lengths(self, delta: str) -> Sequence[tuple[int, bool]]:
        """Of each prefix of a delta, its length, and whether it takes the positions ahead of the text."""
        return self._lengths.get(delta, ())

    def bias_columns(self, position_bias: Tensor, query: Tensor, key: Tensor, past: int | Tensor | None) -> Tensor:
        """Bias of the virtual keys, at the relative positions -length to -1 before the text: (1, heads, queries, length).

        Args:
            position_bias: (1, heads, queries, keys), of the text.
            query: (batch, heads, queries, head_dim).
            key: (batch, heads, keys, head_dim).
            past: number of cached tokens; None in cross-attention, where positions have no bias.
        """
        if self.relative is None or past is None:
            return position_bias.new_zeros(()).expand(*position_bias.shape[:-1], self.columns)
        rows = self.rows
        if rows is not None and rows.prompts is not None:
            return self._behind_prompts(rows.prompts, position_bias, query, past)
        columns: Tensor = self.relative.compute_bias(query.shape[2], self.columns, device=key.device, past_seen_tokens=past + self.columns)
        return columns.to(position_bias.dtype)

    def _behind_prompts(self, prompts: RowPrompts, position_bias: Tensor, query: Tensor, past: int | Tensor) -> Tensor:
        """The same where rows have prompts of different lengths: the hidden tokens between prefix and text do not count."""
        size, device = self.columns, query.device
        found = {
            hidden: self.relative.compute_bias(query.shape[2], size, device=device, past_seen_tokens=past - hidden + size)
            for hidden in dict.fromkeys(prompts.hidden)
        }
        columns = torch.cat([found[hidden] for hidden in prompts.hidden])  # (programs, heads, queries, columns)
        return columns.index_select(0, prompts.spread(query.shape[0])).to(position_bias.dtype)


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


def check_unplaced(site: Site, index: Index) -> None:
    """Refuse relative positions for virtual keys that have none.

    Raises:
        Unsupported: the attention's stack has a table of them.
    """
    stacks = (stack.attentions for stack in index.stacks if any(other.module is site.module for other in stack.attentions))
    if any(has_table(other.module) for attentions in stacks for other in attentions):
        raise Unsupported(
            f"A prefix without positions (placed=False) was asked for at `{site.path}`, whose stack has relative positions, and every key "
            "has one there. Leave `placed` as it is."
        )


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
            f"so virtual keys and values cannot enter it. {_instead(index)}"
        )
    if hasattr(module, "kv_lora_rank"):
        raise Unsupported(
            f"A prefix was asked for at `{site.path}` ({kind}), which keeps one compressed key for all heads. {_instead(index)}"
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
    if has_table(module) and "past_seen_tokens" not in inspect.signature(module.compute_bias).parameters:  # type: ignore[arg-type]
        raise Unsupported(
            f"A prefix was asked for at `{site.path}` ({kind}), whose relative positions cannot be computed for virtual keys. "
            "Choose another method for this backbone, such as LoRA."
        )
    for stack in index.stacks:
        if any(other.module is module for other in stack.attentions):
            for position in stack.positions:
                Shift(position.module, position.path)


def _instead(index: Index) -> str:
    """What to do where no prefix can enter; a prompt enters a stack of text."""
    return f"Choose another method for this backbone, such as {'PromptTuning or ' if index.stacks else ''}LoRA."
