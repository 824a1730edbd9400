"""Jobs that train together end as each does by itself, whatever the others are, do, or suffer."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.errors import DeltaError, Diverged, InvalidValue, OutputError, Unsupported
from deltatune.methods import IA3, BitFit, DiffPruning, FullFineTuning, LoRA, MiSS, PrefixTuning, PTuningV2
from deltatune.multi.together import company as company_module
from deltatune.multi.together.company import Company
from deltatune.multi.together.flat import Flat
from deltatune.multi.together.job import Job
from deltatune.multi.together.portion import Call
from deltatune.multi.together.sharing import ALONE, bins, sizes
from deltatune.multi.together.shells import shell_of, unshare
from deltatune.multi.together.together import train_together
from deltatune.tasks import TaskData
from deltatune.training.result import Result
from tests.multi.alone import alone, far, job, result, still, together
from tests.training import tiny

EXACT = 1e-5


def two_labels() -> TaskData:
    """The tiny task without its third label."""
    whole = tiny.data()
    task = dataclasses.replace(whole.task, name="tiny-two", labels=tiny.LABELS[:2], templates=())
    parts = [rows.select([k for k, label in enumerate(rows["label"]) if label < 2]) for rows in (whole.train, whole.validation, whole.test)]
    return TaskData(task, *parts, "made up, too")


def test_two_jobs_equal_their_own_runs() -> None:
    model = still("bert")
    before = copy.deepcopy(model.state_dict())
    jobs = [job(LoRA(rank=2)), job(LoRA(rank=4), seed=3, lr=5e-3, max_steps=31, batch_size=3, weight_decay=0.1, max_grad_norm=0.5)]
    for outcome, one in zip(together(model, jobs), jobs, strict=True):
        own, other = result(outcome), alone(model, one)
        assert far(own, other) < EXACT
        assert own.metrics == other.metrics and own.intervals == other.intervals
        assert [entry["step"] for entry in own.history] == [entry["step"] for entry in other.history]
        assert [entry["learning_rate"] for entry in own.history] == [entry["learning_rate"] for entry in other.history]
        assert own.trainable_parameters == other.trainable_parameters
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert dt.deltas(model) == []


def test_each_job_drops_by_its_own_random_numbers() -> None:
    """The backbone's dropout, that within attention, LoRA's and a prefix's: as alone, whoever the neighbours are."""
    model = tiny.backbone("bert")
    kinds = [LoRA(rank=2, dropout=0.3), PTuningV2(3, dropout=0.2), BitFit(), LoRA(rank=2)]
    jobs = [job(method, seed=seed, max_steps=12, batch_size=3 + seed) for seed, method in enumerate(kinds)]
    for outcome, one in zip(together(model, jobs), jobs, strict=True):
        assert far(result(outcome), alone(model, one)) < EXACT


@pytest.mark.parametrize("name", ["t5", "llama", "opt"])
def test_other_architectures(name: str) -> None:
    model = tiny.backbone(name)
    jobs = [
        job(LoRA(rank=2, dropout=0.1), max_steps=8),
        job(PrefixTuning(2, mid_dim=4), seed=1, max_steps=8, batch_size=2),
        job(IA3(), max_steps=6),
    ]
    for outcome, one in zip(together(model, jobs), jobs, strict=True):
        assert far(result(outcome), alone(model, one)) < EXACT


def test_heads_of_different_sizes_from_seeds_of_their_own(tmp_path: Path) -> None:
    name = str(tmp_path / "bert")
    tiny.backbone("bert").bert.save_pretrained(name)  # without its head
    tiny.tokenizer().save_pretrained(name)
    settings: dict[str, Any] = {"max_steps": 10, "batch_size": 4, "evaluations": 0, "lr": 1e-3}
    jobs = [
        Job(tiny.data(), LoRA(rank=2), seed=1, **settings),
        Job(two_labels(), IA3(), seed=1, **settings),
        Job(two_labels(), LoRA(rank=2), seed=2, **settings),
        Job(tiny.data(), BitFit(), seed=2, **settings),
    ]
    found = [result(outcome) for outcome in train_together(jobs, name, tokens=100_000, progress="none")]
    for own, one in zip(found, jobs, strict=True):
        other = dt.train(name, one.task, one.methods, progress="none", **one.settings.to_dict())
        assert far(own, other) < EXACT
    assert [own.deltas[0].state_dict()["classifier.weight"].shape[0] for own in found] == [3, 2, 2, 3]
    one, other = (own.backbone.get_submodule("bert.encoder.layer.0.output.dense").weight for own in found[:2])
    assert one.data_ptr() == other.data_ptr()


def test_accumulated_batches_and_rows_of_different_numbers() -> None:
    model = tiny.backbone("bert")
    jobs = [
        job(LoRA(rank=2), grad_accumulation=3, max_steps=7),
        job(IA3(), max_steps=9),
        job(BitFit(), grad_accumulation=2, batch_size=2, max_steps=5),
    ]
    for outcome, one in zip(together(model, jobs), jobs, strict=True):
        assert far(result(outcome), alone(model, one)) < EXACT


def test_phases_scores_and_early_stopping_are_each_jobs_own() -> None:
    model = tiny.backbone("bert")
    jobs = [
        job(DiffPruning(density=0.05, fine_tune_share=0.5), lr=1e-2, max_steps=20, evaluations=4),
        job(LoRA(rank=2), lr=2e-2, max_steps=40, evaluations=10, early_stopping=2),
        job(IA3(), max_steps=12, evaluations=2, epochs=1),
    ]
    for outcome, one in zip(together(model, jobs), jobs, strict=True):
        own, other = result(outcome), alone(model, one)
        assert far(own, other) < EXACT and own.steps == other.steps
        scores = [[(entry["step"], entry["eval_score"]) for entry in run.history if "eval_score" in entry] for run in (own, other)]
        assert scores[0] == scores[1] != []


def test_jobs_join_when_others_leave() -> None:
    model = tiny.backbone("bert")
    jobs = [job(LoRA(rank=2), seed=seed, max_steps=4 + 3 * seed) for seed in range(4)]
    for outcome, one in zip(together(model, jobs, at_once=2), jobs, strict=True):
        assert far(result(outcome), alone(model, one)) < EXACT


def test_a_job_that_diverges_stops_alone(tmp_path: Path) -> None:
    model = tiny.backbone("bert")
    jobs = [job(LoRA(rank=2), max_steps=10), job(LoRA(rank=2), lr=1e30, warmup=0.0, max_steps=10, name="wild"), job(BitFit(), max_steps=10)]
    outcomes = together(model, jobs, out=tmp_path)
    assert isinstance(outcomes[1].error, Diverged) and "at step 2" in str(outcomes[1].error)
    assert outcomes[1].result is None and not (tmp_path / "wild").exists()
    for k in (0, 2):
        assert far(result(outcomes[k]), alone(model, jobs[k])) < EXACT


def test_what_cannot_share_a_forward_is_trained_by_itself_and_says_why() -> None:
    model = tiny.backbone("bert")
    before = copy.deepcopy(model.state_dict())
    jobs = [job(LoRA(rank=2), max_steps=3), job(FullFineTuning(), max_steps=3), job(MiSS(rank=2, dropout=0.1), max_steps=3)]
    jobs += [job(LoRA(rank=2), max_steps=3, gradient_checkpointing=True), job("frozen", max_steps=3)]
    jobs += [job(LoRA(rank=2), max_steps=3, recompute=True)]
    outcomes = together(model, jobs)
    assert outcomes[0].apart is None
    reasons = ("cannot be routed", "no job is told apart", "gradient_checkpointing", "only scored", "recompute")
    for outcome, words in zip(outcomes[1:], reasons, strict=True):
        assert outcome.apart is not None and words in outcome.apart
    for outcome, one in zip(outcomes, jobs, strict=True):
        assert outcome.result is not None
        assert far(outcome.result, alone(model, one)) < EXACT
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_files_are_those_of_a_run_and_finished_jobs_are_left_alone(tmp_path: Path) -> None:
    model = tiny.backbone("bert")
    jobs = [job(LoRA(rank=2), max_steps=6, evaluations=2), job(IA3(), max_steps=4, seed=1)]
    outcomes = together(model, jobs, out=tmp_path / "all")
    for outcome, one in zip(outcomes, jobs, strict=True):
        mine, own = tmp_path / "all" / outcome.name, tmp_path / "own" / outcome.name
        alone(model, one, out=own)
        names = [sorted(str(path.relative_to(place)) for path in place.rglob("*")) for place in (mine, own)]
        assert names[0] == names[1]
        assert (mine / "run.yaml").read_text() == (own / "run.yaml").read_text()
        records = [json.loads((place / "delta/delta.json").read_text()) for place in (mine, own)]
        differ = {"digest", "tensors", "score", "metrics"}  # what rounding changes
        assert {name: entry for name, entry in records[0].items() if name not in differ} == {
            name: entry for name, entry in records[1].items() if name not in differ
        }
        assert json.loads((mine / "metrics.json").read_text()).keys() == json.loads((own / "metrics.json").read_text()).keys()
    again = together(model, [*jobs, job(BitFit(), max_steps=2)], out=tmp_path / "all")
    assert [outcome.result is None for outcome in again] == [True, True, False]
    assert again[0].numbers["score"] == outcomes[0].numbers["score"]
    with pytest.raises(OutputError, match="holds a finished run"):
        together(model, [job(LoRA(rank=2), max_steps=7, evaluations=2)], out=tmp_path / "all")


def broken_off(monkeypatch: pytest.MonkeyPatch, rounds: int, model: Any, jobs: list[Job], **options: Any) -> None:
    """Stopped by the keyboard behind so many rounds."""
    done = 0
    whole = Company.round

    def counted(self: Company) -> None:
        nonlocal done
        if done == rounds:
            raise KeyboardInterrupt
        done += 1
        whole(self)

    with monkeypatch.context() as patch:
        patch.setattr(Company, "round", counted)
        with pytest.raises(KeyboardInterrupt):
            together(model, jobs, **options)


def test_jobs_go_on_where_they_stopped_together_or_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.backbone("bert")
    options: dict[str, Any] = {"max_steps": 16, "evaluations": 2, "save_steps": 4}
    jobs = [
        job(LoRA(rank=2, dropout=0.2), **options),
        job(BitFit(), seed=1, batch_size=5, **options),
        job(IA3(), seed=2, **options | {"max_steps": 5}),
    ]
    whole = [result(outcome) for outcome in together(model, jobs)]
    broken_off(monkeypatch, 11, model, jobs, out=tmp_path)
    assert (tmp_path / "tiny-topics-ia3/metrics.json").exists()
    assert (tmp_path / "tiny-topics-lora/checkpoints/checkpoint-8/complete.json").exists()
    finished = alone(model, jobs[1], out=tmp_path / "tiny-topics-bitfit")
    assert far(finished, whole[1]) < EXACT
    resumed = together(model, jobs, out=tmp_path)
    assert [outcome.result is None for outcome in resumed] == [False, True, True]
    assert far(result(resumed[0]), whole[0]) < EXACT
    assert result(resumed[0]).steps == 16


def test_shells_share_what_is_frozen_and_nothing_else() -> None:
    model = tiny.backbone("bert")
    one, other = shell_of(model), shell_of(model)
    deltas = [dt.attach(shell, BitFit()) for shell in (one, other)]
    for delta in deltas:
        unshare(delta)
    places = [dict(shell.named_parameters()) for shell in (one, other, model)]
    own = {entry.key for entry in deltas[0].entries}
    for name, parameter in places[2].items():
        shared = len({tree[name].data_ptr() for tree in places}) == 1
        assert shared == (name not in own)
        assert parameter.requires_grad
    with torch.no_grad():
        for parameter in deltas[0].parameters():
            parameter.add_(1)
    assert all(torch.equal(places[1][name], places[2][name]) for name in own)


def test_where_sharing_loses_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe changes nothing of the jobs, and its word counts."""
    model = tiny.backbone("bert")
    jobs = [job(LoRA(rank=2, dropout=0.1), max_steps=6), job(BitFit(), seed=1, max_steps=6)]
    shared: list[int] = []
    in_probe: list[int] = []
    whole, probing = company_module.Host.run, company_module.probe

    def probed(*args: Any) -> int:
        before = len(shared)
        size = probing(*args)
        in_probe.append(len(shared) - before)
        return size

    monkeypatch.setattr(company_module.Host, "run", lambda self, *args: shared.append(1) or whole(self, *args))
    monkeypatch.setattr(company_module, "probe", probed)
    monkeypatch.setattr(
        "deltatune.multi.together.sharing._clock", iter(range(1000)).__next__
    )  # every try takes as long: the first one, alone, wins
    outcomes = together(model, jobs, tokens=None)
    assert len(shared) == sum(in_probe) > 0
    for outcome, one in zip(outcomes, jobs, strict=True):
        assert far(result(outcome), alone(model, one)) < 1e-6
    shared.clear()
    assert all(outcome.error is None for outcome in together(model, jobs, tokens=ALONE))
    assert shared == []


def call(rows: int, length: int) -> Call:
    return Call({"input_ids": torch.zeros(rows, length, dtype=torch.long)})


def test_batches_are_packed_by_tokens() -> None:
    calls = [call(2, 10), call(1, 40), call(2, 12), call(1, 38), call(4, 100)]
    assert sorted(bins(calls, 80)) == [[0, 2], [1, 3], [4]]
    assert sorted(bins(calls, 1)) == [[0], [1], [2], [3], [4]]
    assert bins(calls, 10_000) == [[0, 1, 2, 3, 4]]
    assert sizes(calls)[-1] >= 1000 > sizes(calls)[0]
    crossed = [Call({"input_ids": torch.zeros(1, a), "labels": torch.zeros(1, 100 - a)}) for a in (90, 10)]
    assert bins(crossed, 200) == [[0], [1]] and bins(crossed, 360) == [[0, 1]] and sizes(crossed)[-1] >= 360
    other = Call({"input_ids": torch.zeros(2, 10, dtype=torch.long), "use_cache": False})
    assert sorted(bins([*calls, other], 10_000)) == [[0, 1, 2, 3, 4], [5]]


def test_errors_come_before_anything_is_trained(tmp_path: Path) -> None:
    model = tiny.backbone("bert")
    one = job(LoRA(rank=2), max_steps=1)
    with pytest.raises(InvalidValue, match="no jobs"):
        together(model, [])
    with pytest.raises(InvalidValue, match="have one folder"):
        together(model, [job(LoRA(rank=2), out=tmp_path / "x"), job(IA3(), out=tmp_path / "x")])
    with pytest.raises(InvalidValue, match="`at_once` is 0"):
        together(model, [one], at_once=0)
    with pytest.raises(DeltaError, match=r"Job `tiny-two-lora`: .*has 2 labels"):
        together(model, [one, Job(two_labels(), LoRA(rank=2))])
    with pytest.raises(InvalidValue, match="no method"):
        Job("bbc-news", [])
    with pytest.raises(InvalidValue, match=r"LoRA'> as its method.*LoRA\(rank=8\)"):
        Job("bbc-news", LoRA)
    for name in ("../elsewhere", "a/b", "..", "", "a\\b"):
        with pytest.raises(InvalidValue, match="without slashes"):
            job(LoRA(rank=2), name=name)
    with pytest.raises(InvalidValue, match="given a function"):
        job(LoRA(rank=2), where=lambda site: True)
    delta = dt.attach(model, LoRA(rank=2))
    with pytest.raises(Unsupported, match="has deltas already"):
        together(model, [one])
    dt.detach(delta)
    assert list(tmp_path.iterdir()) == []


def test_a_tenant_keeps_what_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes next in the same row begins with moments of its own."""
    made: list[Flat] = []
    begun, settled = Flat.__init__, Flat.settle
    rows: dict[tuple[int, int], list[int]] = {}

    def noted(self: Flat, *args: Any) -> None:
        made.append(self)
        begun(self, *args)

    def moved(self: Flat, row: int) -> None:
        rows.setdefault((id(self.ground), row), []).append(made.index(self))
        settled(self, row)

    monkeypatch.setattr(Flat, "__init__", noted)
    monkeypatch.setattr(Flat, "settle", moved)
    model = tiny.backbone("bert")
    jobs = [job(LoRA(rank=2), max_steps=2 + 4 * (seed == 1), seed=seed, lr=1e-2 * (1 + seed)) for seed in range(3)]
    for outcome, one in zip(together(model, jobs, at_once=2), jobs, strict=True):
        assert far(result(outcome), alone(model, one)) < EXACT
    assert any(len(set(holders)) > 1 for holders in rows.values()), "a row was taken over"
    assert len({ground for ground, _ in rows}) == 1
    assert [{int(state["step"]) for state in flat.optimizer.state.values()} for flat in made] == [{2}, {6}, {2}]


def names(found: list[Result]) -> list[str]:
    return [own.deltas[0].name for own in found]


def test_deltas_have_the_names_they_would_have_alone() -> None:
    outcomes = together(tiny.backbone("bert"), [job(LoRA(rank=2), max_steps=1), job(LoRA(rank=2), seed=1, max_steps=1)])
    assert [outcome.name for outcome in outcomes] == ["tiny-topics-lora", "tiny-topics-lora-2"]
    assert names([result(outcome) for outcome in outcomes]) == ["lora", "lora"]


def test_jobs_that_cannot_be_joined_form_companies(tmp_path: Path) -> None:
    """Another precision, another forward; the frozen tensors are the same."""
    name = str(tmp_path / "bert")
    tiny.backbone("bert").bert.save_pretrained(name)
    tiny.tokenizer().save_pretrained(name)
    settings: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "evaluations": 0, "lr": 1e-3}
    jobs = [Job(tiny.data(), LoRA(rank=2), bf16=k > 1, seed=k, **settings) for k in range(4)]
    found = [result(outcome) for outcome in train_together(jobs, name, tokens=100_000, progress="none")]
    for own, one in zip(found, jobs, strict=True):
        other = dt.train(name, one.task, one.methods, progress="none", **one.settings.to_dict())
        assert far(own, other) < (2e-2 if one.settings.bf16 else EXACT)
    assert len({own.backbone.get_submodule("bert.encoder.layer.0.output.dense").weight.data_ptr() for own in found}) == 1


def test_one_vector_steps_as_many_tensors_do() -> None:
    torch.manual_seed(0)
    plain = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 2), (4,), (2, 2, 2))]
    joined = [torch.nn.Parameter(parameter.detach().clone()) for parameter in plain]
    optimizers = [
        torch.optim.AdamW([{"params": own[:2], "lr": 0.1}, {"params": own[2:], "lr": 0.02}], weight_decay=0.1) for own in (plain, joined)
    ]
    flat: Flat | None = None
    for step in range(5):
        for k in range(3):
            gradient = torch.randn(plain[k].shape, generator=torch.Generator().manual_seed(10 * step + k))
            plain[k].grad = gradient
            if flat is None:
                joined[k].grad = gradient.clone()
            else:
                joined[k].grad += gradient
        if flat is None and step == 1:
            assert Flat.fits(optimizers[1])
            flat = Flat(optimizers[1], Flat.new_ground(optimizers[1]))
        for optimizer in optimizers:
            optimizer.step()
        if flat is None:
            optimizers[1].zero_grad()
        else:
            flat.clear()
    assert flat is not None
    states = [optimizers[0].state_dict(), flat.state_dict()]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for number, state in states[0]["state"].items():
        assert all(torch.allclose(tensor, states[1]["state"][number][name]) for name, tensor in state.items())
    flat.release()
    for one, other in zip(plain, joined, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert len({parameter.untyped_storage().data_ptr() for parameter in joined}) == 3


def test_a_parameter_without_a_gradient_keeps_the_plain_optimiser() -> None:
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([used, unused], weight_decay=0.5)
    used.grad = torch.ones(2)
    assert not Flat.fits(optimizer)
    optimizer.step()
    unused.grad = torch.ones(2)
    assert not Flat.fits(optimizer), "one has taken a step more"


def test_the_probe_comes_when_the_company_halves_and_leaves_accumulated_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.backbone("bert")
    jobs = [job(LoRA(rank=2), grad_accumulation=1 + 2 * (seed == 0), seed=seed, max_steps=3 + 3 * (seed < 2)) for seed in range(4)]
    probed: list[int] = []
    monkeypatch.setattr(company_module, "probe", lambda host, tasks, calls: probed.append(len(tasks)) or 10_000)
    outcomes = together(model, jobs, tokens=None)
    assert probed == [4, 2]
    for outcome, one in zip(outcomes, jobs, strict=True):
        assert far(result(outcome), alone(model, one)) < EXACT
