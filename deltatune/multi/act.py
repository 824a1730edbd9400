"""How routed rows run at one module: tables for what is data, a loop for what is not.

    x <- edits of the input, the last delta of a row first
    y <- f(x), then what the module itself is in each row: other biases, gains, weights
    y <- edits of the output, the first delta of a row first

Rows without a delta pick lane 0 everywhere, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.injection.branches import Given
from deltatune.injection.lean import is_watched
from deltatune.injection.outputs import first_output, put_rows, replace_output
from deltatune.injection.slot import Act, Member, Term, first_input, replace_input, thread_key
from deltatune.injection.tokens import token_ranks
from deltatune.methods.kinds import TokenPatch
from deltatune.multi.apart import Kept, run_apart
from deltatune.multi.plan import Use, Work
from deltatune.multi.tables import Tables
from deltatune.structure.site import Site

if TYPE_CHECKING:
    from deltatune.multi.bank import Bank
    from deltatune.multi.reading import Spot

IDLE = Work()


class RouteAct(Act):
    """Runs what the rows of a route use at one module.

    Attributes:
        bank: of the backbone.
        opened: its routes.
        number: by which plans know this act.
        tables: of this module.
        given: what the sub-layer that ends here was given, where a patch reads that.
        begins: the same of sub-layers that begin here, where a delta at the end asks for it.
        reads_tokens: a patch asks where in its row each token stands.
    """

    listens = True

    def __init__(self, module: nn.Module, bank: Bank, number: int) -> None:
        super().__init__(module)
        self.bank, self.opened, self.number = bank, bank.opened, number
        self.tables = Tables(bank.opened)
        self.given: Given | None = None
        self.begins: tuple[Given, ...] = ()
        self.reads_tokens = False
        site = Site("", module)
        self._makes_output = type(module) is nn.Linear or (site.transposed and site.is_linear)
        self._begun: dict[Given, int] = {}
        self._kept: dict[int, Kept] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def arrange(self, module: nn.Module, terms: Sequence[Term], mixers: nn.ModuleDict) -> None:
        """What acts outside of routes is for the other acts."""

    def append(self, module: nn.Module, term: Term, mixers: nn.ModuleDict) -> None:
        """The same."""

    def place(self, spot: Spot) -> None:
        """Take in a patch; it has no lane yet."""
        self.add(spot.module, Member(spot.delta.name, spot.site, spot.patch, spot.parameter))
        self.tables.place(spot)
        self.reads_tokens |= isinstance(spot.patch, TokenPatch)

    def begin(self, module: nn.Module, spot: Spot, end: RouteAct) -> None:
        """A sub-layer begins here at whose end a patch asks what it was given; until its delta goes."""
        if end.given is None:
            end.given = Given()
        self.add(module, Member(spot.delta.name, spot.site, spot.patch, given=end.given))
        self._begun[end.given] = self._begun.get(end.given, 0) + 1
        self.begins = tuple(self._begun)
        self.opened.keep(self)

    def _end(self, members: Sequence[Member]) -> None:
        """These members are gone: what nobody asks for any more is kept no longer."""
        for given in [member.given for member in members if member.given is not None]:
            self._begun[given] -= 1
            if not self._begun[given]:
                del self._begun[given]
        self.begins = tuple(self._begun)
        self.opened.keep(self)

    def remove(self, module: nn.Module, delta: str) -> None:
        """Forget the lanes of one delta."""
        members = self.members.get(delta, ())
        super().remove(module, delta)
        if any(member.given is not None for member in members):
            self._end(members)
        self.tables.remove(delta)

    def leave(self, around: Any) -> None:
        """The bank forgets an act without deltas."""
        self.bank.acts = {number: act for number, act in self.bank.acts.items() if act is not self}

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move the tables."""
        for table in self.tables:
            table.move(function)

    def work(self) -> Work:
        """What to do now."""
        plan = self.opened.plan
        return IDLE if plan is None else plan.works.get(self.number, IDLE)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Edit the input, and keep what is read behind the forward."""
        if self.opened.plan is None:
            return args, kwargs
        for given in self.begins:
            given.keep(first_input(args, kwargs, self.names))
        work = self.work()
        if not (work.edits or work.aparts):
            return args, kwargs
        kept = Kept(args, kwargs)
        if self.reads_tokens and work.aparts:
            kept.ranks = token_ranks(first_input(args, kwargs, self.names), dict(zip(self.names, args, strict=False)) | kwargs)
        self._kept[thread_key()] = kept
        if not work.edits:
            return args, kwargs
        x = first_input(args, kwargs, self.names)
        for step in reversed(work.steps):
            kept.seen.append(x)
            for use in step.inputs:
                x = self._run(use, self._read(use, x), x)
        kept.seen.reverse()
        return replace_input(args, kwargs, self.names, x)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Edit the output."""
        if self.opened.plan is None:
            return output
        work = self.work()
        if not torch.compiler.is_compiling() and (use := work.only) is not None and isinstance(output, Tensor) and self.given is None:
            x = first_input(args, kwargs, self.names)
            if output.ndim == 3 and output.size(0) == x.size(0) == self.opened.rows:
                return use.apply(x, output, output if self._is_own(module, output) else None)
        kept = self._kept.pop(thread_key(), None) if self._kept else None
        if output is None or not (work.steps or work.module or work.aparts):
            self._let_go()
            return output
        y = first_output(output)
        x = first_input(args, kwargs, self.names)
        plain, own = y, not work.aparts and self._is_own(module, y)
        for use in work.module:
            y = self._run(use, x, y, own)
        for k, step in enumerate(work.steps):
            for use in step.outputs:
                y = self._run(use, self._read(use, kept.seen[k] if kept is not None and work.edits else x), y, own)
        for apart in work.aparts:
            assert kept is not None
            y = run_apart(self, module, apart, kept, plain, y)
        self._let_go()
        return replace_output(output, y)

    def _is_own(self, module: nn.Module, y: Tensor) -> bool:
        """y was made by this forward, nobody else reads it, and no gradient is wanted: it may be overwritten."""
        if not self._makes_output or torch.is_grad_enabled() or torch.compiler.is_compiling() or is_watched(module):
            return False
        changed = torch._C._functorch.maybe_current_level() is not None or torch.is_autocast_enabled(y.device.type)
        return y.is_contiguous() and not changed

    def drop(self) -> None:
        """Let go of what is kept, of this thread."""
        for given in self.begins:
            given.drop()

    def _let_go(self) -> None:
        """The sub-layer that ends here is over."""
        if self.given is not None:
            self.given.drop()

    def _read(self, use: Use, x: Tensor) -> Tensor:
        """What a patch calls x: what the module, or the sub-layer, was given."""
        if use.table.key.reads == "module":
            return x
        assert self.given is not None
        return self.given.read()

    def _run(self, use: Use, x: Tensor, y: Tensor, own: bool = False) -> Tensor:
        """One table: rows of the batch, tokens of a row, channels last, and back; y of its ``own`` may be overwritten."""
        if not torch.compiler.is_compiling() and use.is_idle:
            return y
        table, rows = use.table, self.opened.rows
        axis = table.site.channel_axis if use.table.key.stage != "input" else -1
        whole = y if axis == -1 else y.movedim(axis, -1)
        part = table.site.rows_of(whole, -1)
        spread = part if part.shape[0] % rows == 0 else _spread(part, rows, table.site.path)
        if table.form.whole:
            z = use.apply(_apart(x, rows), _apart(spread, rows)).flatten(0, 1)
        else:
            flat = spread.reshape(rows, -1, spread.shape[-1])
            given = _tokens(x, flat, table.form.reads_input)
            whole_own = own and flat.data_ptr() == y.data_ptr() and flat.numel() == y.numel()
            z = use.apply(given, flat, flat if whole_own else None)
            z = z.view(*spread.shape[:-1], z.shape[-1])
        if table.site.rows is not None:
            z = put_rows(whole, table.site.rows, z)
        return z if axis == -1 else z.movedim(-1, axis)


def _tokens(x: Tensor, y: Tensor, reads: bool) -> Tensor:
    """x as (rows, tokens[, in]), with as many tokens as y has."""
    if not reads:
        return y
    rows = y.shape[0]
    if x.is_floating_point():
        return x.reshape(rows, -1, x.shape[-1]) if x.shape[0] % rows == 0 else x.expand(rows, *x.shape[1:]).reshape(rows, -1, x.shape[-1])
    return (x if x.shape[0] % rows == 0 else x.expand(rows, *x.shape[1:])).reshape(rows, -1)


def _apart(x: Tensor, rows: int) -> Tensor:
    """(rows * factor, ...) -> (rows, factor, ...)."""
    return x.reshape(rows, -1, *x.shape[1:]) if x.shape[0] % rows == 0 else x.expand(rows, *x.shape[1:]).unsqueeze(1)


def _spread(y: Tensor, rows: int, path: str) -> Tensor:
    """What a module computes once for all rows, as positions are, for each of them.

    Raises:
        Unsupported: its rows are those of no batch of this route.
    """
    if y.shape[0] != 1:
        raise Unsupported(
            f"A route of {rows} rows was open while `{path}` computed {y.shape[0]} rows, no multiple of it, so that they cannot be told "
            "apart. Leave that module out of the routed deltas (`where`), or switch to one delta at a time."
        )
    return y.expand(rows, *y.shape[1:])
