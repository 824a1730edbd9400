"""The switch of a backbone: it puts attention implementations that let prefixes in, in place of the plain ones, and back.

It works on copies of the configs, because the setting would reach every model that shares a config object, and it names
the plain implementation again whenever no prefix acts, so that a disabled prefix leaves bit-identical outputs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltatune.injection.attention import register
from deltatune.injection.interface import MARK, has_table, has_variant, is_on_interface
from deltatune.injection.positions import Shift
from deltatune.injection.prefix import PrefixAct
from deltatune.injection.slot import forget_compiled
from deltatune.structure.index import Index
from deltatune.structure.site import Site


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
            if has_table(site.module):
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

    def join(self, act: PrefixAct, site: Site) -> None:
        """Take in the act of an attention."""
        if act in self._acts:
            return
        act.switch = self
        self._acts.append(act)
        stack = self._stack_of.get(site.path)
        if has_table(site.module):
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
