"""Random walks over everything that can be done to attached deltas; after each step the backbone is compared with one built anew.

A refusal is fine as long as it changes nothing; outputs, flags, ``requires_grad`` and the backbone's own state must always
be those of a fresh backbone with the same deltas in the same order.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from deltatune.errors import DeltaError
from deltatune.injection.attach import attach, detach
from deltatune.injection.compose import compose
from deltatune.injection.delta import Delta
from deltatune.injection.ledger import Ledger, ledger_of
from deltatune.injection.merge import merge, unmerge
from deltatune.injection.slot import How, Slot
from deltatune.injection.state import backbone_state
from deltatune.injection.switching import deltas, disabled, switch
from deltatune.methods import IA3, Adapter, BitFit, DiffPruning, FullFineTuning, LoRA, Method
from tests.conformance.cells import fresh, moved, shake
from tests.models import output

METHODS: dict[str, Method] = {
    "lora": LoRA(rank=2),
    "wide": LoRA(rank=3),
    "full": FullFineTuning(),
    "bias": BitFit(),
    "diff": DiffPruning(),
    "scale": IA3(),
    "adapter": Adapter(bottleneck_dim=2),
}
WALKS = {"mlp": ("*", 12), "tied_mlp": ("*", 12), "gpt2": (["attention.{query,value}", "feed_forward.down"], 4)}
STEPS = 16


class Walk:
    """One backbone on its way."""

    def __init__(self, model: str, seed: int) -> None:
        self.where = WALKS[model][0]
        self.random = random.Random(seed)
        self.backbone, self.inputs = fresh(model)
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(self.random.random() < 0.5)
        self.plain = copy.deepcopy(self.backbone)
        self.steps: dict[str, Callable[[], object]] = {
            "attach": self.attach,
            "enable": lambda: self.any().enable(),
            "disable": lambda: self.any().disable(),
            "freeze": lambda: self.any().freeze(),
            "unfreeze": lambda: self.any().unfreeze(),
            "merge": lambda: merge(self.any()),
            "unmerge": lambda: unmerge(self.any()),
            "detach": lambda: detach(self.any()),
            "switch": lambda: switch(self.backbone, self.random.choice([None, self.any().name])),
            "compose": self.compose,
            "dissolve": lambda: self.random.choice(list(self.ledger.compositions.values())).dissolve(),
            "load": self.load,
            "train": self.train,
            "break off": self.break_off,
            "deepcopy": lambda: setattr(self, "backbone", copy.deepcopy(self.backbone)),
            "pickle": lambda: setattr(self, "backbone", pickle.loads(pickle.dumps(self.backbone))),
        }

    @property
    def ledger(self) -> Ledger:
        ledger = ledger_of(self.backbone)
        assert ledger is not None
        return ledger

    def any(self) -> Delta:
        return self.random.choice(deltas(self.backbone))

    def attach(self) -> None:
        name = self.random.choice(sorted(METHODS))
        shake(attach(self.backbone, METHODS[name], self.where, name=name, head=False), seed=self.random.randrange(99))

    def compose(self) -> None:
        members = self.random.sample(deltas(self.backbone), 2)
        how = self.random.choice(get_args(How))
        weights = [self.random.choice([0.0, 0.5, 2.0]) for _ in members] if how == "weighted" else None
        composition = compose(self.backbone, members, how, weights=weights)  # type: ignore[arg-type]
        for tensor in composition.mixing.state_dict().values():
            tensor.add_(0.1 * torch.randn(tensor.shape))

    def load(self) -> None:
        delta = self.any()
        delta.load_state_dict({name: tensor + 0.01 * torch.randn(tensor.shape) for name, tensor in delta.state_dict().items()})

    def train(self) -> None:
        found = output(self.backbone, self.inputs)
        if found.requires_grad:
            optimizer = torch.optim.SGD([*self.any().parameters()], lr=0.01)
            found.square().mean().backward()
            optimizer.step()
            self.backbone.zero_grad()

    def break_off(self) -> None:
        def press(*_: object) -> None:
            raise KeyboardInterrupt

        at = self.random.choice([module for module in self.backbone.modules() if isinstance(module._modules.get("deltatune"), Slot)])
        handle = at.register_forward_hook(press, prepend=True)
        with pytest.raises(KeyboardInterrupt):
            output(self.backbone, self.inputs)
        handle.remove()

    def anew(self) -> nn.Module:
        """A fresh backbone with the same deltas, acting in the same order; nothing is merged."""
        other = copy.deepcopy(self.plain)
        for delta in deltas(self.backbone):
            twin = attach(other, delta.method, self.where, name=delta.name, head=False)
            twin.disable()
            twin.load_state_dict(delta.state_dict())
        for term in self.ledger.terms:
            if len(term.members) == 1:
                next(delta for delta in deltas(other) if delta.name == term.members[0]).enable()
            else:
                weights = term.weights if term.how == "weighted" else None
                state = self.ledger.acting(term).mixing.state_dict()
                composed = compose(other, term.members, term.how, weights=weights)
                composed.mixing.load_state_dict(state)
        return other

    @torch.no_grad()
    def check(self) -> None:
        found = output(self.backbone, self.inputs)
        if not deltas(self.backbone):
            assert torch.equal(found, output(self.plain, self.inputs))
            return
        assert moved(found, output(self.anew(), self.inputs)) < 1e-4
        state: dict[str, Tensor] = backbone_state(self.backbone)
        assert all(torch.equal(state[name], tensor) for name, tensor in self.plain.state_dict().items())
        for delta in deltas(self.backbone):
            assert delta.enabled == (delta.name in self.ledger.acting_deltas)
            wanted = delta.enabled and delta.trainable and not delta.merged
            own = {id(parameter) for patch in delta.patches for parameter in patch.parameters()}
            assert all(parameter.requires_grad == wanted for parameter in delta.parameters() if id(parameter) in own)
        if not any(delta.merged for delta in deltas(self.backbone)):
            with disabled(self.backbone):
                assert torch.equal(output(self.backbone, self.inputs), output(self.plain, self.inputs))

    def end(self) -> None:
        """Detach in any order, those merged on top first."""
        for composition in list(self.ledger.compositions.values()) if deltas(self.backbone) else ():
            composition.dissolve()
        while left := deltas(self.backbone):
            gone = 0
            for delta in self.random.sample(left, len(left)):
                try:
                    detach(delta)
                    gone += 1
                except DeltaError:
                    continue
            assert gone
        self.check()
        assert list(self.backbone.state_dict()) == list(self.plain.state_dict())
        assert [p.requires_grad for p in self.backbone.parameters()] == [p.requires_grad for p in self.plain.parameters()]


@pytest.mark.parametrize(("model", "seed"), [(model, seed) for model, (_, walks) in WALKS.items() for seed in range(walks)])
def test_walk(model: str, seed: int) -> None:
    walk = Walk(model, seed)
    done = []
    for step in range(STEPS):
        named = "attach" if step < 3 or not deltas(walk.backbone) else walk.random.choice(sorted(walk.steps))
        if (named == "dissolve" and not walk.ledger.compositions) or (named == "compose" and len(deltas(walk.backbone)) < 2):
            continue
        try:
            walk.steps[named]()
            done.append(named)
        except DeltaError as refusal:
            done.append(f"{named}: {refusal}")
        walk.check()
    walk.end()
    assert len(done) > STEPS / 2
