"""Settings and run files: checked where they are set, and the same again when read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltatune.errors import InvalidValue, UnknownName
from deltatune.methods import IA3, LoRA
from deltatune.training.arguments import Schedule
from deltatune.training.run import DataFile, Run, read_run
from deltatune.training.settings import Settings


def test_loose_values_become_typed() -> None:
    settings = Settings.of(
        {"lr": "2e-4", "bf16": "true", "epochs": "2", "max_steps": "10", "report_to": "tensorboard,wandb", "warmup": None}
    )
    assert settings == Settings(lr=2e-4, bf16=True, epochs=2.0, max_steps=10, report_to=("tensorboard", "wandb"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "`epochs` is 0.0; it has to be greater than 0"),
        ({"warmup": 1.0}, "share of all steps"),
        ({"lr": -1}, "greater than 0, or left out"),
        ({"batch_size": "many"}, "`batch_size` is 'many'; it has to be a whole number"),
        ({"max_steps": 1.5}, "whole number"),
        ({"bf16": "perhaps"}, "true or false"),
        ({"quantize": "int3"}, "one of int8, nf4"),
        ({"framing": "tail"}, "one of auto, .*cloze, head, .*text2text"),
        ({"early_stopping": 2, "evaluations": 0}, "`evaluations` above 0"),
        ({"lr": "inf"}, "`lr` is inf; it has to be a finite number"),
        ({"epochs": "1e999"}, "a finite number"),
        ({"max_grad_norm": float("nan")}, "a finite number"),
        ({"seed": 5_000_000_000}, "`seed` is 5000000000; it has to be less than 4294967296"),
        ({"max_steps": 2**70}, "has to be less than"),
        ({"report_to": 5}, "`report_to` is 5; it has to be a list of names"),
        ({"report_to": {"a": "b"}}, "list of names"),
        ({"report_to": [1]}, "list of names"),
    ],
)
def test_a_value_out_of_range_is_an_error(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        Settings.of(fields)


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"There is no setting called `batchsize`\. Did you mean `batch_size`"):
        Settings.of({"batchsize": 3})


RUNS = [
    Run("minilm", "bbc-news", (LoRA(rank=4),), settings=Settings(lr=1e-5, bf16=True, seed=3), fingerprint="abc"),
    Run(
        "a/b",
        DataFile("rows.csv", text=("title", "body"), label="topic"),
        (LoRA(), IA3()),
        where=("attention.*", "!encoder"),
        layers="top:3",
    ),
]


@pytest.mark.parametrize("run", RUNS)
def test_a_run_file_reads_back_as_it_was(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    assert read_run(tmp_path) == run
    assert read_run(tmp_path / "run.yaml").differences(run) == []


def test_differences_are_named() -> None:
    other = Run("minilm", "bbc-news", (LoRA(rank=8),), settings=Settings(lr=1e-5, bf16=True, seed=3), fingerprint="abc")
    assert RUNS[0].differences(other) == ["method.rank: 4 here, 8 there"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", InvalidValue, "is not YAML"),
        ("[1]", InvalidValue, "holds list"),
        ("backbone: minilm\nmethod: lora\n", InvalidValue, "does not say its task"),
        ("backbone: a\ntask: b\nmethod: lroa\n", UnknownName, "Did you mean `lora`"),
        ("backbone: a\ntask: b\nmethod: {name: lora, rnk: 3}\n", UnknownName, "Did you mean `rank`"),
        ("backbone: a\ntask: b\nmethod: {rank: 3}\n", InvalidValue, "has no `name`"),
        ("backbone: a\ntask: b\nmethod: lora\nsetings: {}\n", UnknownName, "Did you mean `settings`"),
        ("backbone: a\ntask: b\nmethod: lora\n5: {}\n", UnknownName, "has the entry `5`"),
        ("backbone: 5\ntask: b\nmethod: lora\n", InvalidValue, "has 5 for `backbone`; it has to be a text"),
        ("backbone: a\ntask: [b]\nmethod: lora\n", InvalidValue, "`task`; it has to be a text"),
        ("backbone: a\ntask: b\ndata: {path: c}\nmethod: lora\n", InvalidValue, "both `task` and `data`"),
        ("backbone: a\ndata: rows.csv\nmethod: lora\n", InvalidValue, "'rows.csv' for `data`; it has to be names with values"),
        ("backbone: a\ndata: {path: c, lable: d}\nmethod: lora\n", UnknownName, "`data` in the configuration .* Did you mean `label`"),
        ("backbone: a\ndata: {text: c}\nmethod: lora\n", InvalidValue, "does not say the `path` of its `data`"),
        ("backbone: a\ndata: {path: 5}\nmethod: lora\n", InvalidValue, "5 for `path`; it has to be a text"),
        ("backbone: a\ndata: {path: c, text: [1]}\nmethod: lora\n", InvalidValue, "a text, or a list of texts"),
        ("backbone: a\ntask: b\nmethod: 5\n", InvalidValue, "5 for `method`; it has to be a method's name"),
        ("backbone: a\ntask: b\nmethod: [1]\n", InvalidValue, "for `method`"),
        ("backbone: a\ntask: b\nmethod: {name: 5}\n", InvalidValue, "for `method`"),
        ("backbone: a\ntask: b\nmethod: {name: lora, 1: 2}\n", InvalidValue, "for `method`"),
        ("backbone: a\ntask: b\nmethod: {name: lora, rank: [1]}\n", InvalidValue, "`rank` takes a whole number"),
        ("backbone: a\ntask: b\nmethod: lora\nwhere: 3\n", InvalidValue, "3 for `where`; it has to be a text, or a list of texts"),
        ("backbone: a\ntask: b\nmethod: lora\nwhere: {a: b}\n", InvalidValue, "for `where`"),
        ("backbone: a\ntask: b\nmethod: lora\nwhere: []\n", InvalidValue, "for `where`"),
        ("backbone: a\ntask: b\nmethod: lora\nlayers: true\n", InvalidValue, "True for `layers`; it has to be a number"),
        ("backbone: a\ntask: b\nmethod: lora\nlayers: {a: b}\n", InvalidValue, "for `layers`"),
        ("backbone: a\ntask: b\nmethod: lora\nsettings: 3\n", InvalidValue, "3 for `settings`; it has to be names with values"),
        ("backbone: a\ntask: b\nmethod: lora\nsettings: [1]\n", InvalidValue, "for `settings`"),
        ("backbone: a\ntask: b\nmethod: lora\nsettings: {1: 2}\n", InvalidValue, "for `settings`"),
        ("backbone: a\ntask: b\nmethod: lora\nsettings: {lr: [1]}\n", InvalidValue, "`lr` is .* a number"),
        ("backbone: a\ntask: b\nmethod: lora\nversions: 3\n", InvalidValue, "for `versions`"),
        ("backbone: a\ntask: b\nmethod: lora\nfingerprint: [1]\n", InvalidValue, "for `fingerprint`"),
    ],
)
def test_a_broken_run_file_is_an_error(text: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(error, match=message):
        read_run(tmp_path)
    with pytest.raises(InvalidValue, match="cannot be read"):
        read_run(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("settings", "rows", "expected"),
    [
        (Settings(epochs=3, batch_size=16, evaluations=5), 1490, Schedule(282, 57, 57, 1)),
        (Settings(max_steps=1000, evaluations=4), 64, Schedule(1000, 250, 250, 10)),
        (Settings(epochs=1, batch_size=4, grad_accumulation=3, evaluations=0), 20, Schedule(2, 0, 1, 1)),
        (Settings(epochs=0.1, batch_size=16, save_steps=7), 1600, Schedule(10, 2, 7, 1)),
    ],
)
def test_schedule(settings: Settings, rows: int, expected: Schedule) -> None:
    assert Schedule.of(settings, rows) == expected
