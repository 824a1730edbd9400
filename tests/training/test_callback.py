"""A method's life: called at its moments by any Trainer, and by a loop of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import deltatune as dt
from deltatune.errors import CheckpointError, InvalidValue
from deltatune.methods import DiffPruning, LoRA
from deltatune.methods.kinds import Family, Kind, Method, OutputPatch, Patch, Phase
from deltatune.structure.site import Site
from deltatune.tasks.framing import HeadFraming
from deltatune.training.callback import DeltaCallback
from deltatune.training.life import Life, phase_starts
from deltatune.training.state import read_state, write_state
from tests.training import tiny


class Shift(OutputPatch):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))
        self.diary: list[Any] = []

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.shift


@dataclass(frozen=True)
class Lively(Method):
    """y + b, with everything a method can declare; it writes down what is called."""

    family: ClassVar[Family] = "addition"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.query",)

    pull: float = 0.5

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        return [Shift(site.out_features)]

    def prepare(self, patches: Mapping[str, Patch], backbone: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
        first = next(iter(batches))
        assert "labels" in first
        for patch in patches.values():
            patch.diary.append(("prepare", len(first["labels"])))  # type: ignore[union-attr,operator]

    def penalty(self, patches: Sequence[Patch]) -> Tensor:
        return self.pull * torch.stack([patch.shift.sum() for patch in patches]).sum()  # type: ignore[union-attr,operator]

    def after_step(self, patches: Sequence[Patch], step: int, total: int) -> None:
        assert all(patch.shift.grad is not None for patch in patches)
        patches[0].diary.append(("step", step, total))  # type: ignore[union-attr,operator]

    @property
    def phases(self) -> tuple[Phase, ...]:
        return Phase("early", 0.5), Phase("late", 0.5)

    def enter(self, patches: Sequence[Patch], phase: str) -> None:
        patches[0].diary.append(phase)  # type: ignore[union-attr,operator]

    def export(self, patches: Sequence[Patch], shared: nn.Module | None) -> None:
        patches[0].diary.append("export")  # type: ignore[union-attr,operator]

    def is_exported(self, patches: Sequence[Patch]) -> bool:
        return "export" in patches[0].diary  # type: ignore[operator]


DIARY = [("prepare", 8), "early", ("step", 1, 4), ("step", 2, 4), "late", ("step", 3, 4), ("step", 4, 4), "export"]


def plain_trainer(method: Method, out: Path, callbacks: Any = None, **options: Any) -> tuple[Trainer, dt.Delta]:
    model, data = tiny.backbone("bert"), tiny.data()
    torch.manual_seed(0)
    delta = dt.attach(model, method)
    framing = HeadFraming(data.task, tiny.tokenizer(), 32)
    settings: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2} | options
    args = TrainingArguments(
        str(out), per_device_train_batch_size=8, use_cpu=True, report_to="none", disable_tqdm=True, log_level="error", **settings
    )
    trainer = Trainer(
        model, args, data_collator=framing.collate, train_dataset=framing.encode(data.train), callbacks=callbacks or [DeltaCallback(delta)]
    )
    return trainer, delta


def diary(delta: dt.Delta) -> list[Any]:
    return delta.entries[0].patch.diary  # type: ignore[return-value]


def test_a_plain_trainer_calls_everything_once_and_in_order(tmp_path: Path) -> None:
    trainer, delta = plain_trainer(Lively(), tmp_path)
    trainer.train()
    assert diary(delta) == DIARY


def test_a_second_run_into_the_same_folder_saves_its_own_deltas(tmp_path: Path) -> None:
    for seed in (1, 2):
        trainer, delta = plain_trainer(LoRA(rank=2), tmp_path, seed=seed, learning_rate=1e-2 * seed)
        trainer.train()
        saved = load_file(tmp_path / "checkpoint-4" / f"{delta.name}.delta.safetensors")
        assert tiny.same(saved, delta.state_dict())


def test_a_loop_of_ones_own_calls_the_same() -> None:
    model, data = tiny.backbone("bert"), tiny.data()
    delta = dt.attach(model, Lively())
    framing = HeadFraming(data.task, tiny.tokenizer(), 32)
    features = framing.encode(data.train)
    batches = [framing.collate(features[start : start + 8]) for start in range(0, 32, 8)]
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2))
    life = Life(delta, total=4)
    life.begin(batches)
    for batch in batches:
        life.before_step()
        model(**batch).loss.backward()
        life.add_penalty()
        optimizer.step()
        life.after_step()
        optimizer.zero_grad()
    life.finish()
    assert diary(delta) == DIARY


def test_the_penalty_adds_its_gradient_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_steps": 1, "gradient_accumulation_steps": 3, "max_grad_norm": 0.0}
    gradients: dict[float, Tensor] = {}
    for pull in (0.0, 0.25):
        trainer, delta = plain_trainer(Lively(pull=pull), tmp_path / str(pull), **options)
        monkeypatch.setattr(trainer.model, "train", partial(type(trainer.model).train, trainer.model, False))  # no dropout
        kept: list[Tensor] = []
        step = torch.optim.AdamW.step

        def spy(self: Any, *args: Any, delta: dt.Delta = delta, kept: list[Tensor] = kept, step: Any = step, **kwargs: Any) -> Any:
            kept.append(next(delta.parameters()).grad.clone())
            return step(self, *args, **kwargs)

        torch.optim.AdamW.step = spy  # type: ignore[method-assign]
        try:
            trainer.train()
        finally:
            torch.optim.AdamW.step = step  # type: ignore[method-assign]
        gradients[pull] = kept[0]
    torch.testing.assert_close(gradients[0.25] - gradients[0.0], torch.full_like(gradients[0.0], 0.25))


def test_a_plain_trainer_resumes_the_delta_and_its_phases(tmp_path: Path) -> None:
    method = DiffPruning(density=0.05, fine_tune_share=0.5)
    whole, first = plain_trainer(method, tmp_path / "whole", max_steps=6, save_steps=2)
    whole.train()
    resumed, second = plain_trainer(method, tmp_path / "whole", max_steps=6, save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    masks = [{name: tensor for name, tensor in delta.state_dict().items() if name.endswith("index")} for delta in (first, second)]
    assert masks[0]
    assert tiny.same(*masks)


def test_a_checkpoint_without_the_delta_is_an_error(tmp_path: Path) -> None:
    trainer, _ = plain_trainer(LoRA(), tmp_path, max_steps=2)
    trainer.train()
    next(tmp_path.glob("checkpoint-2/*.delta.safetensors")).unlink()
    again, _ = plain_trainer(LoRA(), tmp_path, max_steps=4)
    with pytest.raises(CheckpointError, match="`checkpoint-2` in the output folder holds no delta"):
        again.train(resume_from_checkpoint=True)


def test_a_state_of_another_delta_is_an_error(tmp_path: Path) -> None:
    one, other = (dt.attach(tiny.backbone("bert"), LoRA(rank=rank), name="x") for rank in (2, 3))
    write_state([one], tmp_path)
    with pytest.raises(CheckpointError, match="misshapen"):
        read_state([other], tmp_path)
    next(tmp_path.iterdir()).write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="no readable state of delta `x`"):
        read_state([one], tmp_path)


@pytest.mark.parametrize(
    ("shares", "total", "starts"), [((0.5, 0.5), 4, [0, 2]), ((0.1, 0.9), 3, [0, 0]), ((0.6, 0.2, 0.2), 10, [0, 6, 8])]
)
def test_phases_begin_at_their_share(shares: tuple[float, ...], total: int, starts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    phases = tuple(Phase(str(share), share) for share in shares)
    monkeypatch.setattr(Lively, "phases", phases)
    delta = dt.attach(tiny.backbone("bert"), Lively())
    assert phase_starts(delta, total) == starts
    life = Life(delta, total)
    for _ in range(total - 1):  # a run that is stopped early has been through all of them, too
        life.before_step()
    life.finish()
    assert [entry for entry in diary(delta) if isinstance(entry, str)] == [*(phase.name for phase in phases), "export"]


def test_a_life_has_steps() -> None:
    with pytest.raises(InvalidValue, match="at least one"):
        Life([], 0)
    with pytest.raises(InvalidValue, match="no training yet"):
        _ = DeltaCallback([]).life


def test_resuming_enters_each_phase_once_more_at_most() -> None:
    delta = dt.attach(tiny.backbone("bert"), dataclasses.replace(Lively()))
    life = Life(delta, 4)
    life.resume(2)
    assert diary(delta) == ["early"]
    life.before_step()
    life.before_step()
    assert diary(delta) == ["early", "late"]
