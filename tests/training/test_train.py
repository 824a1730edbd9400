"""The main job on tiny models: what it learns, what it writes, what it leaves as it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import deltatune as dt
from deltatune.errors import CheckpointError, Diverged, InvalidValue, NoSite, OutputError, UnknownName, Unsupported
from deltatune.injection.recompute import Anew
from deltatune.methods import IA3, BitFit, DiffPruning, LoRA, Masking, Method, PrefixTuning
from deltatune.training import files
from deltatune.training.predict import Predictor, evaluate, predict
from deltatune.training.run import read_run
from deltatune.training.train import replay, train
from tests.training import tiny

SMALL = LoRA(rank=2)
WIDE = ["attention.*", "feed_forward.*", "embedding"]


def quick(name: str = "bert", method: Any = SMALL, **options: Any) -> Any:
    settings = {"max_steps": 4, "evaluations": 2, "batch_size": 8, "progress": "none"} | options
    return train(tiny.backbone(name), tiny.data(), method, tokenizer=tiny.tokenizer(), **settings)


def marks(model: Any) -> tuple[Any, ...]:
    """What a training must leave as it was."""
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    names = {name: sorted(vars(module)) for name, module in model.named_modules()}
    return names, hooks, str(model.config), sorted(vars(model.config))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_it_learns(name: str) -> None:
    data = tiny.data(train=96, test=24)
    options: dict[str, Any] = {"max_steps": 50, "batch_size": 16, "lr": 1e-2, "evaluations": 1, "progress": "none"}
    result = train(tiny.backbone(name), data, LoRA(rank=4), where=WIDE, tokenizer=tiny.tokenizer(), **options)
    assert result.score > 0.8
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"gradient_checkpointing": True}, {"recompute": True}], ids=lambda options: " ".join(options) or "plain"
)
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_the_backbone_is_given_back_as_it_was(name: str, options: dict[str, Any]) -> None:
    model = tiny.backbone(name)
    before, tensors = marks(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result = train(model, tiny.data(), LoRA(rank=2), tokenizer=tiny.tokenizer(), max_steps=2, batch_size=8, progress="none", **options)
    assert result.backbone is model
    assert not model.training
    dt.detach(result.deltas[0])
    assert marks(model) == before
    assert tiny.same(tensors, dict(model.state_dict()))


@pytest.mark.parametrize("way", ["gradient_checkpointing", "recompute"])
def test_what_is_made_anew_changes_nothing_but_memory(way: str) -> None:
    plain, recomputed = quick(lr=1e-2), quick(lr=1e-2, **{way: True})
    assert plain.history == recomputed.history
    assert tiny.same(plain.deltas[0].state_dict(), recomputed.deltas[0].state_dict())


def test_inputs_are_made_anew_within_a_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    own = Anew.read
    monkeypatch.setattr(Anew, "read", lambda self: made.append(self.formula.names) or own(self))
    model = tiny.backbone("bert")
    result = train(model, tiny.data(), LoRA(rank=2), tokenizer=tiny.tokenizer(), max_steps=2, batch_size=8, progress="none", recompute=True)
    assert "NativeLayerNormBackward0" in made
    made.clear()
    train(model, tiny.data(), result.deltas[0], tokenizer=tiny.tokenizer(), max_steps=2, batch_size=8, progress="none")
    assert not made


def test_accumulated_batches_give_the_step_of_one_large_batch() -> None:
    options = {"name": "llama", "max_steps": 2, "lr": 1e-2}  # a model without dropout
    large, small = quick(batch_size=36, **options), quick(batch_size=9, grad_accumulation=4, **options)
    a, b = large.deltas[0].state_dict(), small.deltas[0].state_dict()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4
    assert large.history[0]["loss"] == pytest.approx(small.history[0]["loss"], rel=1e-4)


def test_several_methods_train_together_and_are_saved_as_one(tmp_path: Path) -> None:
    place = tiny.folder("bert", tmp_path)
    result = train(place, tiny.data(), [LoRA(rank=2), BitFit()], out=tmp_path / "run", max_steps=2, batch_size=8, progress="none")
    assert [delta.name for delta in result.deltas] == ["lora", "bitfit"]
    _, _, opened = dt.open(tmp_path / "run")
    assert isinstance(opened, dt.Composition)
    assert {member.name for member in opened.deltas} == {"lora", "bitfit"}


def test_early_stopping_ends_with_the_best_delta() -> None:
    result = quick(max_steps=40, evaluations=20, early_stopping=2, lr=0.3)
    scores = {entry["step"]: entry["eval_score"] for entry in result.history if "eval_score" in entry}
    assert result.steps < 40
    best = max(scores.values())
    assert max(list(scores.values())[:-2]) == best
    framing = Predictor(result.backbone, result.tokenizer, result.deltas[0], _framing())
    assert evaluate(framing, dataclasses.replace(tiny.data(), test=tiny.data().validation))["score"] == best


def _framing() -> Any:
    from deltatune.tasks.framing import HeadFraming

    return HeadFraming(tiny.data().task, tiny.tokenizer(), 128)


def test_other_deltas_do_not_train() -> None:
    model = tiny.backbone("bert")
    other = dt.attach(model, LoRA(rank=2), name="other")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items() if "lora" in name}
    train(model, tiny.data(), IA3(), tokenizer=tiny.tokenizer(), max_steps=2, batch_size=8, progress="none")
    assert tiny.same(before, {name: tensor for name, tensor in other.state_dict().items() if "lora" in name})
    assert other.trainable


def test_a_run_folder(tmp_path: Path) -> None:
    place, out = tiny.folder("bert", tmp_path), tmp_path / "deep" / "run"
    result = train(place, tiny.data(), "lora", out=out, max_steps=4, batch_size=8, lr=1e-2, progress="none", where="attention.*")
    assert {path.name for path in out.iterdir()} == {"delta", "metrics.json", "curve.png", "run.yaml"}
    written = json.loads((out / "metrics.json").read_text())
    assert written["score"] == result.score
    assert written["delta_bytes"] == sum(path.stat().st_size for path in (out / "delta").iterdir())
    assert written["history"] == result.history
    assert result.line().keys() == {"score", "metric", "trainable_parameters", "total_parameters", "seconds", "delta_bytes", "out"}
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert read_run(out).where == "attention.*"


@pytest.mark.parametrize("method", [PrefixTuning(3, mid_dim=8), Masking(), DiffPruning(density=0.1)], ids=lambda one: type(one).__name__)
def test_what_trained_is_counted_before_the_final_form_and_what_is_stored_behind_it(method: Method) -> None:
    fresh = dt.attach(tiny.backbone("bert"), method).budget()
    result = quick(method=method, max_steps=2, evaluations=0)
    assert result.trainable_parameters == fresh.delta
    assert result.stored_parameters == result.deltas[0].budget().delta < fresh.delta
    assert result.total_parameters == fresh.N


def test_a_control_is_only_scored(tmp_path: Path) -> None:
    place, out = tiny.folder("bert", tmp_path), tmp_path / "run"
    result = train(place, tiny.data(), "frozen", out=out, progress="none")
    assert (result.steps, result.trainable_parameters, result.history) == (0, 0, [])
    assert {path.name for path in out.iterdir()} == {"delta", "metrics.json", "run.yaml"}
    assert evaluate(Predictor.open(out), tiny.data())["score"] == result.score, "the head that was scored is in the file"


def test_what_a_tracker_writes_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = files.mark_complete

    def tracked(folder: Path) -> None:
        (folder.parent / "events").write_text("logged")
        write(folder)

    monkeypatch.setattr("deltatune.training.trainer.mark_complete", tracked)
    quick(out=tmp_path)
    assert (tmp_path / "logs" / "events").read_text() == "logged"
    assert not (tmp_path / "checkpoints").exists()


def test_a_model_that_does_not_say_where_it_is_from_gives_a_delta_without_a_name(tmp_path: Path) -> None:
    quick(out=tmp_path / "run")
    with pytest.raises(CheckpointError, match="does not say the name of its backbone"):
        dt.open(tmp_path / "run")
    assert dt.load(tiny.backbone("bert"), tmp_path / "run" / "delta").name == "lora"


def test_the_saved_delta_predicts_and_scores_as_in_training(tmp_path: Path) -> None:
    data = tiny.data()
    for name in ("bert", "llama", "t5"):
        out = tmp_path / f"run-{name}"
        result = train(tiny.folder(name, tmp_path), data, "lora", out=out, max_steps=3, batch_size=8, lr=1e-2, progress="none")
        predictor = Predictor.open(out)
        assert tiny.same(result.deltas[0].state_dict(), predictor.delta.state_dict())
        assert evaluate(predictor, data)["score"] == result.score
        said = predict(predictor, ["goal match", "bank profit of the week"])
        assert all(one.label in data.task.labels and one.scores[one.label] == one.score == max(one.scores.values()) for one in said)
        assert sum(said[0].scores.values()) == pytest.approx(1)


def test_a_run_replays_from_its_file(tmp_path: Path) -> None:
    rows = tiny.data(train=60).train
    lines = [json.dumps({"body": text, "topic": f"t{label}"}) for text, label in zip(rows["text"], rows["label"], strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    from deltatune.training.run import DataFile

    file = DataFile(str(tmp_path / "rows.jsonl"), text="body", label="topic")
    options: dict[str, Any] = {"max_steps": 3, "batch_size": 8, "lr": 1e-2, "progress": "none"}
    train(tiny.folder("bert", tmp_path), file, LoRA(rank=2, dropout=0.1), out=tmp_path / "first", **options)
    replay(read_run(tmp_path / "first"), out=tmp_path / "second", progress="none")
    first, second = ((tmp_path / name / "delta" / "delta.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    assert (tmp_path / "first/run.yaml").read_text() == (tmp_path / "second/run.yaml").read_text()
    assert evaluate(tmp_path / "first") == evaluate(tmp_path / "second" / "delta")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:-6]))
    with pytest.raises(InvalidValue, match="other rows of `rows`"):
        replay(read_run(tmp_path / "first"), out=tmp_path / "third", progress="none")


def test_a_function_for_where_is_written_as_paths(tmp_path: Path) -> None:
    out = tmp_path / "run"
    quick(out=out, where=lambda site: site.role == "attention.query" and site.layer == 1)
    assert read_run(out).where == ("bert.encoder.layer.1.attention.self.query",)
    (out / "metrics.json").unlink()
    assert quick(out=out, where=lambda site: site.role == "attention.query" and site.layer == 1).out == out, "it is the same run"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"where": "attention.qurey"}, NoSite, "qurey"),
        ({"layers": 99}, NoSite, "99"),
        ({"framing": "text2text"}, Unsupported, "encoder writes no words"),
        ({"class_weights": True, "name": "llama"}, InvalidValue, "by label words"),
        ({"quantize": "int8"}, InvalidValue, "needs a backbone by name"),
        ({"template": 99}, InvalidValue, "put to a head here, which takes no template"),
        ({"template": 99, "name": "llama"}, InvalidValue, "1 templates, numbered from 0; 99"),
        ({"method": "lroa"}, UnknownName, "Did you mean `lora`"),
        ({"learning_rate": 1}, UnknownName, "no setting called `learning_rate`"),
        ({"method": []}, InvalidValue, "no method"),
        ({"report_to": "tensorbord"}, UnknownName, "no experiment tracker `tensorbord`. Did you mean `tensorboard`"),
    ],
)
def test_bad_input_leaves_nothing_behind(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        quick(out=tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_a_given_model_as_it_was() -> None:
    model = tiny.backbone("bert")
    before = marks(model)
    with pytest.raises(InvalidValue, match="no training row of `tiny-topics`"):
        data = tiny.data()
        only = dataclasses.replace(data, train=data.train.select([0, 1]))
        train(model, only, LoRA(), tokenizer=tiny.tokenizer(), class_weights=True, progress="none")
    assert marks(model) == before
    assert dt.deltas(model) == []


@pytest.mark.parametrize(
    ("name", "made", "said", "message"),
    [
        ("bert", 9, 3, "has 3 labels, but the head of this BertForSequenceClassification has 9 outputs, and its config says 3"),
        ("bert", 2, 3, "has 2 outputs, and its config says 3"),
        ("bert", 3, 7, "has 3 outputs, and its config says 7"),
        ("bert", 7, 7, r"has 7 outputs\. Load it with num_labels=3"),
        ("roberta", 9, 3, "has 9 outputs"),
    ],
)
def test_labels_that_do_not_fit_the_head_are_an_error(name: str, made: int, said: int, message: str) -> None:
    model: Any = tiny.backbone(name)
    head = model.classifier if name == "bert" else model.classifier.out_proj
    head.weight, head.bias, head.out_features = nn.Parameter(torch.zeros(made, head.in_features)), nn.Parameter(torch.zeros(made)), made
    model.config.num_labels = said
    with pytest.raises(InvalidValue, match=message):
        train(model, tiny.data(), "lora", tokenizer=tiny.tokenizer(), progress="none")


def test_a_trained_head_of_another_size_is_not_dropped_unasked(tmp_path: Path) -> None:
    model: Any = tiny.backbone("bert")
    type(model)(type(model.config)(**{**model.config.to_dict(), "num_labels": 4})).save_pretrained(tmp_path / "bert")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")
    options: dict[str, Any] = {"max_steps": 2, "batch_size": 8, "progress": "none", "out": tmp_path / "run"}
    with pytest.raises(InvalidValue, match=r"holds a trained head of 4 outputs \(classifier.bias, classifier.weight\), but 3 are wanted"):
        train(str(tmp_path / "bert"), tiny.data(), "lora", **options)
    assert not (tmp_path / "run").exists()
    result = train(str(tmp_path / "bert"), tiny.data(), "lora", new_head=True, **options)
    assert evaluate(tmp_path / "run", tiny.data())["score"] == result.score, "the delta brings its head"


def test_an_out_that_is_taken_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    quick(out=out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="holds a finished run"):
        quick(out=out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (out / "mine.txt").write_text("mine")
    again = quick(out=out, overwrite=True, lr=1e-2)
    assert json.loads((out / "metrics.json").read_text())["score"] == again.score
    assert (out / "mine.txt").read_text() == "mine"
    (out / "metrics.json").unlink()
    with pytest.raises(OutputError, match=r"unfinished run that differs: settings\.lr: 0\.5 here, 0\.01 there"):
        quick(out=out, lr=0.5)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("")
    with pytest.raises(OutputError, match="holds `notes`, which is no run"):
        quick(out=tmp_path / "other", overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        quick(out=tmp_path / "other" / "notes")


def test_a_training_that_breaks_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deltatune.training.trainer.write_state", full)
    with pytest.raises(OutputError, match="No space left on device"):
        quick(out=tmp_path / "deep" / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_diverges_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"diverged: at step \d, `lora` holds NaN .* Lower the learning rate"):
        quick(out=tmp_path / "run", lr=1e30, max_grad_norm=0)
    assert list(tmp_path.iterdir()) == [], "no checkpoint is left from which the run would diverge again"
    assert quick(out=tmp_path / "run", lr=1e-3).out == tmp_path / "run"


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_quantised_backbone_trains(scheme: str, tmp_path: Path) -> None:
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}  # nf4 has blocks of 64
    BertModel(BertConfig(vocab_size=101, **size)).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"max_steps": 2, "batch_size": 8, "progress": "none"}
    result = train(str(tmp_path / "base"), tiny.data(), "lora", quantize=scheme, **options)
    plain = train(str(tmp_path / "base"), tiny.data(), "lora", **options)
    assert (result.trainable_parameters, result.total_parameters) == (plain.trainable_parameters, plain.total_parameters)
    kinds = {type(parameter).__name__ for parameter in result.backbone.parameters()}
    assert {"int8": "Int8Tensor", "nf4": "Params4bit"}[scheme] in kinds
    assert result.deltas[0].trained_parameters()
    assert torch.isfinite(torch.tensor(result.history[0]["loss"]))
