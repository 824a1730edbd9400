"""How prompt patches run: X <- [P; X] at the embeddings of a text stack.

Ahead of the stack's forward the ids become embeddings with P in front, and mask, positions and token types grow with
them; behind it the outputs of the virtual tokens are cut off again, so that labels and heads keep the caller's length.
An encoder keeps the outputs of those that its decoder is to see, and the decoder's mask of the encoder grows with them.
With a key-value cache P enters at the first step, and the later steps only reckon with it. The cache remembers the
length of its prompt, because one that was filled under another prompt would give wrong logits unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.cached import capacity, enlarge, first_mask, is_made_ahead, later_mask, seen_tokens, store, stored
from deltatune.injection.slot import Act, Member, Term, input_names, thread_key
from deltatune.methods.kinds import Patch, PromptPatch
from deltatune.structure.index import Index
from deltatune.structure.site import Site

if TYPE_CHECKING:
    from deltatune.injection.around import Around, Guest
    from deltatune.injection.rows import RowPrompts


@dataclass
class Layout:
    """Where the virtual tokens stand in each row: [padding; P; text].

    Behind the padding on the left, so that nothing comes between P and the text: windows and relative positions count
    what is there, masked or not.

    Attributes:
        virtual: number of virtual tokens.
        total: virtual tokens and the caller's; 0 until something was joined.
        padding: (batch, 1), tokens of padding on the left of each row; None where no row has any.
        own: (batch, 1), virtual tokens of each row, where the hidden ones of shorter rows go behind the text: for stacks that count
            positions from the first token on and cannot be told others.
    """

    virtual: int
    padding: Tensor | None
    total: int = 0
    own: Tensor | None = None

    @classmethod
    def of(cls, virtual: int, mask: Tensor | None) -> Layout:
        """The layout for a mask (batch, keys) of 0 and 1."""
        if mask is None:
            return cls(virtual, None)
        padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
        known = mask.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere a look would cost a synchronisation
        return cls(virtual, None if known and not padding.any() else padding)

    def join(self, virtual: Tensor, text: Tensor, dim: int = 1) -> Tensor:
        """(..., virtual, ...) and (..., text, ...) -> (..., virtual + text, ...) along ``dim``."""
        joined = torch.cat([virtual, text], dim=dim)
        self.total = joined.shape[dim]
        if self.padding is None and self.own is None:
            return joined
        place = torch.arange(self.total, device=joined.device)[None]
        padding = place.new_zeros(1, 1) if self.padding is None else self.padding.to(joined.device)
        own = torch.full_like(padding, self.virtual) if self.own is None else self.own.to(joined.device)
        order = place + self.virtual - own  # (batch, virtual + text): text behind its prompt
        order = torch.where(place < padding + own, place - padding + self.virtual - own, order)
        order = torch.where(place < padding, place + self.virtual, order)
        order = torch.where(order >= self.total, order - self.total, order)  # hidden ones, behind the text
        return torch.take_along_dim(joined, order[..., None] if joined.ndim == 3 and dim == 1 else order, dim=dim)

    def join_mask(self, mask: Tensor, seen: Tensor | None = None) -> Tensor:
        """The mask (batch, keys) with the virtual tokens visible, but where ``seen`` (batch, virtual) tells otherwise."""
        return self.join(mask.new_ones(mask.shape[0], self.virtual) if seen is None else seen.to(mask), mask)

    def cut(self, joined: Tensor) -> Tensor:
        """(batch, virtual + text, hidden) -> (batch, text, hidden)."""
        if self.padding is None and self.own is None:
            return joined[:, self.virtual :]
        place = torch.arange(joined.shape[1] - self.virtual, device=joined.device)[None]
        padding = place.new_zeros(1, 1) if self.padding is None else self.padding.to(joined.device)
        place = torch.where(place < padding, place, place + (self.virtual if self.own is None else self.own.to(joined.device)))
        return torch.take_along_dim(joined, place[..., None], dim=1)


class PromptAct(Act):
    """Runs the prompts of one text stack.

    Attributes:
        seen: of every virtual token that acts, whether the decoder sees what the encoder makes of it.
        guest: who knows of routes; None while nothing was routed.
        number: by which it knows this act.
    """

    listens = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.patches: list[PromptPatch] = []
        self.seen: list[bool] = []
        self._columns: dict[str, list[bool]] = {}
        self._tables: list[tuple[str, nn.Embedding]] = []
        self._handles: list[RemovableHandle] = []
        self._shown: tuple[str, ...] = ()
        self._layouts: dict[int, Layout] = {}
        self.guest: Guest | None = None
        self.number = -1

    @property
    def rows(self) -> RowPrompts | None:
        """The prompts of each row, within a route."""
        return None if self.guest is None else self.guest.rows_of(self.number)

    @property
    def virtual(self) -> int:
        """Number of virtual tokens in front of every row now, hidden ones included."""
        rows = self.rows
        return len(self.seen) if rows is None else rows.length

    @property
    def keeps(self) -> bool:
        """The outputs of virtual tokens stay, because a decoder sees some of them."""
        rows = self.rows
        return any(self.seen) if rows is None else rows.keeps

    def columns(self, delta: str) -> Sequence[bool]:
        """Of every virtual token of a delta, whether the decoder sees what the encoder makes of it."""
        return self._columns.get(delta, ())

    @classmethod
    def check(cls, index: Index, site: Site, patch: Patch) -> None:
        """Refuse a module that is no text stack, or no decoder sees the outputs of."""
        check_prompt(site, index)
        if isinstance(patch, PromptPatch) and patch.seen_by_decoder and not decoders_of(site, index):
            raise Unsupported(
                f"A prompt with seen_by_decoder=True was asked for at `{site.path or '(the backbone)'}` ({type(site.module).__name__}), "
                "which is no encoder with a decoder behind it. Leave `seen_by_decoder` out."
            )

    def join(self, around: Around, backbone: nn.Module, index: Index, site: Site) -> None:
        """Learn what the stack is made of; hook the module that ends its token sequence, where not the stack itself, and its decoders."""
        module = site.module
        stack = next(stack for stack in index.stacks if stack.site.module is module)
        self._tables = [(site.path, site.module) for site in stack.positions if isinstance(site.module, nn.Embedding)]
        if stack.inner is not module:
            self._handles.append(stack.inner.register_forward_hook(self.end))
        for decoder in decoders_of(site, index):
            self._shown = input_names(type(decoder))
            self._handles.append(decoder.register_forward_pre_hook(self.show, with_kwargs=True))

    def add(self, module: nn.Module, member: Member) -> None:
        """Measure the prompt now: later its tensors may be shards."""
        super().add(module, member)
        with torch.no_grad():
            seen = isinstance(member.patch, PromptPatch) and member.patch.seen_by_decoder
            self._columns.setdefault(member.delta, []).extend([seen] * member.patch().shape[0])

    def remove(self, module: nn.Module, delta: str) -> None:
        """Forget the prompts of one delta, and with the last one the hooks on other modules."""
        super().remove(module, delta)
        self._columns.pop(delta, None)
        while not self.members and self._handles:
            self._handles.pop().remove()

    def arrange(self, module: nn.Module, terms: Sequence[Term], mixers: nn.ModuleDict) -> None:
        """Concatenate the prompts in the order of the terms."""
        self.patches, self.seen = [], []
        for term in terms:
            self.append(module, term, mixers)

    def append(self, module: nn.Module, term: Term, mixers: nn.ModuleDict) -> None:
        """Concatenate its prompts, too."""
        for name in term.members:
            self.patches += [member.patch for member in self.members.get(name, []) if isinstance(member.patch, PromptPatch)]
            self.seen += self.columns(name)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put P in front at the first step; later reckon with the P that the cache holds.

        Raises:
            InvalidValue: the table of positions is too short, or the cache was filled under another prompt.
            Unsupported: a mask, a cache or packed sequences that a prompt cannot enter.
        """
        call = dict(zip(self.names, args, strict=False)) | kwargs
        cache = call.get("past_key_values")
        seen = seen_tokens(cache)
        if seen:
            self._check_cache(cache)
        if not self.virtual:
            return args, kwargs
        return (), self._later(call, cache, seen) if seen else self._first(module, call, cache)

    def _later(self, call: dict[str, Any], cache: Any, seen: int) -> dict[str, Any]:
        """The call with the P in the cache reckoned with."""
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        queries = (call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]).shape[1]
        if not torch.compiler.is_compiling():
            self._check_count(mask, positions, cache, seen, queries)
        rows = self.rows
        if is_made_ahead(mask, cache):
            call["attention_mask"] = later_mask(cache, queries)
        elif mask is not None:
            seen_of = None if rows is None else rows.visible(mask.shape[0])
            call["attention_mask"] = Layout.of(self.virtual, mask).join_mask(mask, seen_of)[:, : capacity(cache)]
        elif rows is not None:
            call["attention_mask"] = later_mask(cache, queries)
        if rows is not None and positions is None and "position_ids" in self.names and not self._counts_by_mask:
            device = stored(cache).mask.device  # type: ignore[union-attr]
            positions = (seen - self.virtual + torch.arange(queries, device=device))[None]
        if positions is not None:
            call["position_ids"] = positions + (self.virtual if rows is None else _down(rows, call, positions))
        return call

    def _first(self, module: nn.Module, call: dict[str, Any], cache: Any) -> dict[str, Any]:
        """The call with P in front of its tokens."""
        self._refuse(call)
        ids = call.get("input_ids")
        embeds: Tensor = call["inputs_embeds"] if ids is None else module.get_input_embeddings()(ids)  # type: ignore[operator]
        if embeds.ndim != 3:
            raise Unsupported(f"A prompt was asked to join inputs of shape {tuple(embeds.shape)}. Give the stack one sequence a row.")
        batch, length, _ = embeds.shape
        self._check_positions(length)
        mask = first_mask(call.get("attention_mask"), cache, length)
        rows = self.rows
        if mask is None and rows is not None:
            mask = torch.ones(batch, length, dtype=torch.long, device=embeds.device)
        layout = self._layout(mask, batch, cache)
        P = rows.prompts(embeds) if rows is not None else torch.cat([patch() for patch in self.patches]).expand(batch, -1, -1).to(embeds)
        embeds = layout.join(P, embeds)  # P (batch, virtual, hidden)
        call |= {"input_ids": None, "inputs_embeds": embeds}
        if mask is not None:
            mask = layout.join_mask(mask, None if rows is None else rows.visible(batch))
        if "attention_mask" in call or rows is not None:
            call["attention_mask"] = mask
        if "position_ids" in self.names:
            call["position_ids"] = self._positions(call.get("position_ids"), ids, embeds, layout)
        if (types := call.get("token_type_ids")) is not None:
            call["token_type_ids"] = layout.join(types.new_zeros(types.shape[0], self.virtual), types)
        if cache is not None:
            enlarge(cache, self.virtual, getattr(module.config, "sliding_window", None))
            store(cache, self.virtual, mask)
        self._layouts[thread_key()] = layout
        return call

    def _positions(self, positions: Tensor | None, ids: Tensor | None, embeds: Tensor, layout: Layout) -> Tensor | None:
        """Positions of [P; X]: P first, X shifted; None where the stack counts them itself, and rightly."""
        start, rows = self._start(), self.rows
        ahead: int | Tensor = self.virtual if rows is None else rows.lengths(embeds.shape[0])[:, None]
        if positions is None:
            if start and ids is not None:
                real = ids.ne(start - 1)  # RoBERTa counts real tokens, but only if it sees the ids; padding stays at ``start - 1``
                text = (real.cumsum(1) + ahead) * real + start - 1
            elif rows is None or self._counts_by_mask:
                return None
            else:
                text = torch.arange(start, start + embeds.shape[1] - self.virtual, device=embeds.device)[None] + ahead
        else:
            text = positions + ahead
        virtual = torch.arange(start, start + self.virtual, dtype=text.dtype, device=text.device).expand(*text.shape[:-1], -1)
        if rows is not None:
            virtual = (virtual - (self.virtual - rows.lengths(embeds.shape[0])[:, None]).to(text)).clamp_min(start)
        return layout.join(virtual, text, dim=-1)

    def _layout(self, mask: Tensor | None, batch: int, cache: Any) -> Layout:
        """Where the virtual tokens stand for a mask of the text."""
        rows, layout = self.rows, Layout.of(self.virtual, mask)
        if rows is not None and self.fills_behind:
            layout.own = self._lengths_behind(rows, batch, cache)
        return layout

    def _lengths_behind(self, rows: RowPrompts, batch: int, cache: Any) -> Tensor:
        """Virtual tokens of each row, (batch, 1), where hidden ones go behind the text."""
        if cache is not None:
            raise Unsupported(
                "Prompts of different lengths were asked to act in one batch of a decoder that counts its positions itself. "
                "Use prompts of one length there, or PrefixTuning."
            )
        return rows.lengths(batch)[:, None]

    @property
    def fills_behind(self) -> bool:
        """In a route, the hidden tokens of rows with shorter prompts stand behind the text: positions are counted, and not to be told."""
        return bool(self._tables) and "position_ids" not in self.names and not self._counts_by_mask

    @property
    def _counts_by_mask(self) -> bool:
        """The stack counts what the mask shows, as OPT does, so that hidden tokens have no positions."""
        return any("attention_mask" in input_names(type(table)) for _, table in self._tables)

    def _start(self) -> int:
        """The first position of a text: 0, or behind the position that is kept for padding."""
        for _, table in self._tables:
            if table.padding_idx is not None:
                return table.padding_idx + 1
        return 0

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Post-hook of the inner module: cut the virtual tokens off before anything reads single positions."""
        layout = self._layouts.get(thread_key())
        return output if layout is None or self.keeps else strip(output, layout)

    def show(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pre-hook of a decoder: its mask of the encoder's outputs has the virtual tokens among them that it sees."""
        if not self.keeps:
            return None
        call = dict(zip(self._shown, args, strict=False)) | kwargs
        states, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        if states is None:
            return None
        batch, length = states.shape[0], states.shape[1] - self.virtual
        if mask is None:
            mask = torch.ones(batch, max(length, 0), dtype=torch.long, device=states.device)
        if mask.ndim != 2 or mask.shape[1] != length:
            return None  # the encoder ran without this prompt, or the caller's mask tells of it
        rows = self.rows
        seen = mask.new_tensor(self.seen).expand(batch, -1) if rows is None else rows.seen(batch)
        call["encoder_attention_mask"] = self._layout(mask, batch, None).join_mask(mask, seen)
        return (), call

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Cut the virtual tokens off the last hidden state and the hidden states; attentions keep their columns."""
        layout = self._layouts.pop(thread_key(), None)
        if layout is None or output is None:
            return output
        values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else ()
        for value in values:
            if hasattr(value, "get_seq_length"):
                store(value, self.virtual, stored(value).mask)
        return output if self.keeps else strip(output, layout)

    def _check_cache(self, cache: Any) -> None:
        filled = stored(cache).length
        if filled != self.virtual:
            raise InvalidValue(
                f"The key-value cache was filled with {filled} virtual tokens in front, but {self.virtual} act now. "
                "Start with an empty cache after attaching, detaching, enabling or disabling a prompt."
            )

    def _check_count(self, mask: Any, positions: Tensor | None, cache: Any, seen: int, queries: int) -> None:
        """``generate`` on a filled cache drops as many tokens as the cache holds, virtual ones included: the first new ones are lost."""
        text = seen - self.virtual
        if isinstance(mask, Tensor) and mask.ndim == 2 and capacity(cache) is None:
            lost = mask.shape[1] != text + queries
        else:
            lost = mask is None and positions is not None and positions.ndim == 2 and int(positions[0, 0]) != text
        if lost:
            raise Unsupported(
                f"The key-value cache holds {text} tokens of text and {self.virtual} virtual ones, and the new tokens do not continue "
                "the text: generate() was given a filled cache, and cannot tell the virtual tokens in it from text. "
                "Give it the whole text and no cache, or call the model itself with the new tokens only."
            )

    def _check_positions(self, length: int) -> None:
        for path, table in self._tables:
            room = table.num_embeddings - self._start() - int(getattr(table, "offset", 0))
            if self.virtual + length > room:
                raise InvalidValue(
                    f"{length} tokens of text and {self.virtual} virtual ones need {self.virtual + length} positions, but `{path}` has "
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


def _down(rows: RowPrompts, call: dict[str, Any], positions: Tensor) -> Tensor:
    """Virtual tokens of each row, as a column beside its positions."""
    given = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
    return rows.lengths(given.shape[0]).to(positions.device)[:, None]


def strip(output: Any, layout: Layout) -> Any:
    """An output without its virtual positions, in every (batch, virtual + text, hidden) it holds."""
    if isinstance(output, Tensor):
        return layout.cut(output) if output.ndim == 3 and output.shape[1] == layout.total else output
    if hasattr(output, "items"):  # transformers' ModelOutput
        return type(output)(**{name: strip(value, layout) for name, value in output.items()})
    if isinstance(output, tuple):
        return tuple(strip(value, layout) for value in output)
    return output


def decoders_of(site: Site, index: Index) -> list[nn.Module]:
    """The decoders that attend to the outputs of an encoder; none where the site is none."""
    stacks = {stack.side: stack.site.module for stack in index.stacks}
    decoder = stacks.get("decoder")
    wanted = {"encoder_hidden_states", "encoder_attention_mask"}
    alone = decoder is None or stacks.get("encoder") is not site.module or not wanted <= set(input_names(type(decoder)))
    return [] if alone or decoder is None else [decoder]


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
    names = set(input_names(type(site.module)))
    if not {"input_ids", "inputs_embeds", "attention_mask"} <= names or "per_layer_inputs" in names:
        raise Unsupported(
            f"A prompt was asked for at `{site.path}` ({kind}), whose tokens cannot be given as embeddings alone. "
            "Choose another method for this backbone, such as PrefixTuning or LoRA."
        )
