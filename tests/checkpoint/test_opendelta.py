"""OpenDelta's folders: what is read computes what OpenDelta's formulas compute, and everything else is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.errors import CheckpointError, DeltaError, Unsupported
from deltatune.injection.delta import Delta
from tests.checkpoint.fixtures.checks import Change, check_outputs, check_refused
from tests.checkpoint.fixtures.formulas import computing
from tests.checkpoint.fixtures.write_opendelta import CASES, make, write
from tests.models import MODELS, output

LENIENT = {"compacter"}
"""Types whose outputs our methods compute, but which they train in another form."""


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_outputs(kind: str, name: str, tmp_path: Path) -> None:
    model, inputs = MODELS[name]()
    made = make(kind, name, model)
    check_outputs(model, inputs, made, write(tmp_path / "od", made), "opendelta", tmp_path / "native", allow_unknown=kind in LENIENT)


def test_an_unfrozen_head_goes_with_it(tmp_path: Path) -> None:
    model, inputs = MODELS["bert"]()
    made = make("bitfit", "bert", model, head=True)
    with torch.no_grad(), computing(model, made):
        expected = output(model, inputs)
    folder = write(tmp_path / "od", made)
    delta = dt.load(model, folder, allow_bin=True)
    torch.testing.assert_close(output(model, inputs), expected)
    assert isinstance(delta, Delta) and "classifier.weight" in delta.state_dict()
    dt.detach(delta)
    without = dt.load(model, folder, allow_bin=True, head=False)
    assert isinstance(without, Delta) and "classifier.weight" not in without.state_dict()


def test_an_unfrozen_norm_goes_beside_it(tmp_path: Path) -> None:
    model, inputs = MODELS["bert"]()
    made = make("adapter", "bert", model)
    for kind in ("weight", "bias"):
        key = f"bert.encoder.layer.1.output.LayerNorm.{kind}"
        made.tensors[key] = made.values[key] = model.get_parameter(key).detach() + 0.5
    with torch.no_grad(), computing(model, made):
        expected = output(model, inputs)
    both = dt.load(model, write(tmp_path / "od", made), name="od", allow_bin=True)
    torch.testing.assert_close(output(model, inputs), expected)
    assert [part.name for part in both.deltas] == ["od-adapter", "od-unfrozen"]  # type: ignore[union-attr]


def test_another_outermost_module(tmp_path: Path) -> None:
    model, inputs = MODELS["bert"]()
    made = make("lora", "bert", model)
    dt.load(model.bert, write(tmp_path / "od", made), allow_bin=True)  # type: ignore[arg-type]
    with torch.no_grad():
        found = model.bert(**inputs)[0]  # type: ignore[operator]
    fresh, _ = MODELS["bert"]()
    with torch.no_grad(), computing(fresh, made):
        torch.testing.assert_close(found, fresh.bert(**inputs)[0])  # type: ignore[operator]


REFUSED: list[tuple[str, Change, type[DeltaError], str]] = [
    ("lora", lambda c, t: c.update(delta_type="soft_prompt"), Unsupported, "delta_type = 'soft_prompt'"),
    ("lora", lambda c, t: c.update(delta_type=["lora"]), Unsupported, "delta_type"),
    ("lora", lambda c, t: c.update(novelty=3), CheckpointError, "novelty = 3"),
    ("lora", lambda c, t: c.update(lora_r="four"), CheckpointError, "lora_r = 'four'"),
    ("lora", lambda c, t: t.clear(), CheckpointError, "holds no LoRA"),
    ("lora", lambda c, t: t.pop(next(iter(t))), CheckpointError, "lacks `lora_A`"),
    ("lora", lambda c, t: t.update({next(iter(t)): torch.ones(3)}), CheckpointError, "not 2 dimensions"),
    ("lora", lambda c, t: t.update({next(iter(t)): torch.ones(9, 9)}), CheckpointError, "misshapen"),
    ("lora", lambda c, t: t.update({next(iter(t)): torch.full((4, 32), torch.nan)}), CheckpointError, "NaN or infinity"),
    ("lora", lambda c, t: t.update({"no.such.module.lora.lora_A": torch.ones(4, 32)}), CheckpointError, "lacks `lora_B`"),
    ("lora", lambda c, t: t.update({"elsewhere": torch.ones(1)}), CheckpointError, "`elsewhere`"),
    ("adapter", lambda c, t: c.update(non_linearity="leakyrelu"), Unsupported, "activation `leakyrelu`"),
    ("compacter", lambda c, t: None, CheckpointError, "factorized_phm = True"),
    ("compacter", lambda c, t: c.update(shared_phm_rule=True), Unsupported, "shared_phm_rule = True"),
    ("compacter", lambda c, t: c.update(reduction_factor=3), Unsupported, "no whole fraction"),
    ("low_rank_adapter", lambda c, t: c.update(low_rank_rank=2), Unsupported, "low_rank_rank = 2"),
    ("prefix", lambda c, t: c.update(reparameterize=False), CheckpointError, "holds no prefix"),
]


@pytest.mark.parametrize(("kind", "change", "error", "said"), REFUSED, ids=[said for *_, said in REFUSED])
def test_refused(kind: str, change: Change, error: type[DeltaError], said: str, tmp_path: Path) -> None:
    model, _ = MODELS["bert"]()
    made = make(kind, "bert", model)
    change(made.config, made.tensors)
    check_refused(model, write(tmp_path / "od", made), error, said)


def test_a_prefix_of_t5_is_refused(tmp_path: Path) -> None:
    model, _ = MODELS["t5"]()
    made = make("flat_prefix", "bert", MODELS["bert"]()[0])
    with pytest.raises(Unsupported, match="computes the position bias of every layer but the first anew"):
        dt.load(model, write(tmp_path / "od", made), allow_bin=True)


def test_a_pickle_is_asked_for(tmp_path: Path) -> None:
    model, _ = MODELS["bert"]()
    folder = write(tmp_path / "od", make("lora", "bert", model))
    with pytest.raises(CheckpointError, match=r"is a pickle.*--allow-bin"):
        dt.load(model, folder)


class Harm:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harmed"),)


def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, _ = MODELS["bert"]()
    made = make("lora", "bert", model)
    made.tensors["harm"] = Harm()  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="cannot be read as tensors alone"):
        dt.load(model, write(tmp_path / "od", made), allow_bin=True)
    assert not Path("harmed").exists()
