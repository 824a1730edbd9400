"""How prompt patches run: X <- [P; X] at the embeddings of a text stack.

Ahead of the stack's forward the ids become embeddings with P in front, and mask, positions and token types grow with
them; behind it the outputs of the virtual tokens are cut off again, so that labels and heads keep the caller's length.
With a key-value cache P enters at the first step, and the later steps only reckon with it. The cache remembers the
length of its prompt, because one that was filled under another prompt would give wrong logits unnoticed.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.cached import enlarge, remember, seen_tokens, stored_prompt, widen
from deltatune.injection.slot import Act, Term, slot_of
from deltatune.methods.kinds import PromptPatch
from deltatune.structure.index import Index
from deltatune.structure.site import Site


class PromptAct(Act):
    """Runs the prompts of one text stack.

    Attributes:
        length: number of virtual tokens that act.
    """

    listens = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.patches: list[PromptPatch] = []
        self.length = 0
        self._names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        self._tables: list[tuple[str, nn.Embedding]] = []
        self._handle: RemovableHandle | None = None
        self._cut: dict[int, tuple[int, int]] = {}

    def join(self, index: Index, module: nn.Module) -> None:
        """Learn what the stack is made of; hook the module that ends its token sequence, where that is not the stack itself."""
        stack = next(stack for stack in index.stacks if stack.site.module is module)
        self._tables = [(site.path, site.module) for site in stack.positions if isinstance(site.module, nn.Embedding)]
        if stack.inner is not module and self._handle is None:
            self._handle = stack.inner.register_forward_hook(self.end)

    def remove(self, module: nn.Module, delta: str) -> None:
        """Forget the prompts of one delta, and with the last one the hook on the inner module."""
        super().remove(module, delta)
        if not self.members and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def arrange(self, module: nn.Module, terms: Sequence[Term], gates: nn.ModuleDict) -> None:
        """Concatenate the prompts in the order of the terms."""
        names = [name for term in terms for name in term.members]
        self.patches = [member.patch for name in names for member in self.members.get(name, []) if isinstance(member.patch, PromptPatch)]
        with torch.no_grad():
            self.length = sum(patch().shape[0] for patch in self.patches)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put P in front at the first step; later reckon with the P that the cache holds.

        Raises:
            InvalidValue: the table of positions is too short, or the cache was filled under another prompt.
            Unsupported: a mask, a cache or packed sequences that a prompt cannot enter.
        """
        call = dict(zip(self._names, args, strict=False)) | kwargs
        cache = call.get("past_key_values")
        seen = seen_tokens(cache)
        if seen:
            self._check_cache(cache)
        if not self.length:
            return args, kwargs
        if not seen:
            return (), self._first(module, call, cache)
        if (mask := call.get("attention_mask")) is not None:
            call["attention_mask"] = widen(mask, self.length, cache)
        if (positions := call.get("position_ids")) is not None:
            call["position_ids"] = positions + self.length
        return (), call

    def _first(self, module: nn.Module, call: dict[str, Any], cache: Any) -> dict[str, Any]:
        """The call with P in front of its tokens."""
        self._refuse(call)
        ids = call.get("input_ids")
        embeds: Tensor = call["inputs_embeds"] if ids is None else module.get_input_embeddings()(ids)  # type: ignore[operator]
        if embeds.ndim != 3:
            raise Unsupported(
                f"A prompt was asked to join inputs of shape {tuple(embeds.shape)}. Give the stack one sequence a row."
            )
        batch, length, _ = embeds.shape
        self._check_positions(length)
        P = torch.cat([patch() for patch in self.patches])  # (virtual, hidden)
        embeds = torch.cat([P.to(embeds)[None].expand(batch, -1, -1), embeds], dim=1)
        call |= {"input_ids": None, "inputs_embeds": embeds}
        if "position_ids" in self._names:
            call["position_ids"] = self._positions(call.get("position_ids"), ids, embeds)
        if (types := call.get("token_type_ids")) is not None:
            call["token_type_ids"] = torch.cat([types.new_zeros(types.shape[0], self.length), types], dim=1)
        if (mask := call.get("attention_mask")) is not None:
            call["attention_mask"] = widen(mask, self.length, cache)
        if cache is not None:
            enlarge(cache, self.length)
            remember(cache, self.length)
        self._cut[_thread()] = (self.length, self.length + length)
        return call

    def _positions(self, positions: Tensor | None, ids: Tensor | None, embeds: Tensor) -> Tensor | None:
        """Positions of [P; X]: P first, X shifted; None where the stack counts them itself, and rightly."""
        start = self._start()
        if positions is None:
            if not start or ids is None:
                return None
            # RoBERTa counts real tokens, but only if it sees the ids: padding keeps the position ``start - 1``
            real = ids.ne(start - 1)
            return torch.cat(
                [self._virtual(embeds, start).expand(ids.shape[0], -1), (real.cumsum(1) + self.length) * real + start - 1], dim=1
            )
        virtual = self._virtual(embeds, start).to(positions.dtype)
        return torch.cat([virtual.expand(*positions.shape[:-1], -1), positions + self.length], dim=-1)

    def _virtual(self, embeds: Tensor, start: int) -> Tensor:
        return torch.arange(start, start + self.length, device=embeds.device)

    def _start(self) -> int:
        """The first position of a text: 0, or behind the position that is kept for padding."""
        padding: list[int] = [index for _, table in self._tables if (index := table.padding_idx) is not None]
        return padding[0] + 1 if padding else 0

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Post-hook of the inner module: cut the virtual tokens off before anything reads single positions."""
        cut = self._cut.get(_thread())
        return output if cut is None else strip(output, *cut)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Cut the virtual tokens off the last hidden state and the hidden states; attentions keep their columns."""
        cut = self._cut.pop(_thread(), None)
        if cut is None or output is None:
            return output
        values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else ()
        for value in values:
            if hasattr(value, "get_seq_length"):
                remember(value, self.length)
        return strip(output, *cut)

    def _check_cache(self, cache: Any) -> None:
        stored = stored_prompt(cache)
        if stored != self.length:
            raise InvalidValue(
                f"The key-value cache was filled with {stored} virtual tokens in front, but {self.length} act now. "
                "Start with an empty cache after attaching, detaching, enabling or disabling a prompt."
            )

    def _check_positions(self, length: int) -> None:
        for path, table in self._tables:
            room = table.num_embeddings - self._start() - int(getattr(table, "offset", 0))
            if self.length + length > room:
                raise InvalidValue(
                    f"{length} tokens of text and {self.length} virtual ones need {self.length + length} positions, but `{path}` has "
                    f"{room}. Truncate the text, or use fewer virtual tokens."
                )

    def _refuse(self, call: dict[str, Any]) -> None:
        """Packed sequences: only the first of a row would see P."""
        positions, packed = call.get("position_ids"), call.get("cu_seq_lens_q") is not None
        if positions is not None and call.get("attention_mask") is None and call.get("past_key_values") is None:
            packed = packed or (not torch.compiler.is_compiling() and bool((positions.diff(dim=-1) < 0).any()))
        if packed:
            raise Unsupported(
                "A prompt was asked to join packed sequences, and only the first sequence of each row would see it. Pad instead of "
                "packing, or use PrefixTuning, which reaches every sequence."
            )


def strip(output: Any, virtual: int, total: int) -> Any:
    """An output without its first ``virtual`` positions, in every (batch, total, hidden) it holds."""
    if isinstance(output, Tensor):
        return output[:, virtual:] if output.ndim == 3 and output.shape[1] == total else output
    if hasattr(output, "items"):  # transformers' ModelOutput
        return type(output)(**{name: strip(value, virtual, total) for name, value in output.items()})
    if isinstance(output, tuple):
        return tuple(strip(value, virtual, total) for value in output)
    return output


def check_prompt(site: Site, index: Index) -> None:
    """Refuse a module that is no text stack, or a stack that embeddings do not describe.

    Raises:
        Unsupported: a prompt cannot be put in front of its tokens.
    """
    kind = type(site.module).__name__
    if not any(stack.site.module is site.module for stack in index.stacks):
        raise Unsupported(
            f"A prompt was asked for at `{site.path}` ({kind}), which is no text stack. Text stacks have the role `stack`: "
            f"{', '.join(f'`{stack.site.path}`' for stack in index.stacks) or 'this backbone has none'}."
        )
    names = set(inspect.signature(type(site.module).forward).parameters)
    if not {"input_ids", "inputs_embeds", "attention_mask"} <= names or "per_layer_inputs" in names:
        raise Unsupported(
            f"A prompt was asked for at `{site.path}` ({kind}), whose tokens cannot be given as embeddings alone. "
            "Choose another method for this backbone, such as PrefixTuning or LoRA."
        )


def join_prompt(index: Index, site: Site) -> None:
    """Tell the act of a stack what the stack is made of."""
    slot = slot_of(site.module)
    act = slot.acts["PromptAct"] if slot is not None else None
    assert isinstance(act, PromptAct)
    act.join(index, site.module)


def _thread() -> int:
    """Key of what one forward has in flight. Compiled code is single: Dynamo cannot ask for the thread."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
