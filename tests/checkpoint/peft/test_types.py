"""Every type in the table, both ways: ours opens PEFT's folder, PEFT opens ours, and the files are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deltatune as dt
from deltatune.checkpoint.peft import tuners
from tests.checkpoint.peft.cases import CASES, MODELS, TASK, WHERE, Case, meaning, reopened, result, save, sized, theirs

PATTERNS = frozenset({"r", "alpha", "lora_alpha", "rank_pattern", "alpha_pattern"})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_ways(case: Case, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    backbone, inputs = case.build()
    plain = result(backbone, inputs)
    model = theirs(case, backbone)
    save(model, tmp_path / "theirs")
    expected = result(model, inputs, case.virtual)
    assert (expected - plain).abs().max() > 1e-4, "it does something"

    delta = dt.load(backbone, tmp_path / "theirs", name="read")
    assert isinstance(delta, dt.Delta) or case.name.endswith("patterns")
    torch.testing.assert_close(result(backbone, inputs), expected, atol=1e-5, rtol=1e-5)

    dt.save(delta, tmp_path / "ours", format="peft")
    dt.detach(delta)
    files = [folder / "adapter_model.safetensors" for folder in (tmp_path / "theirs", tmp_path / "ours")]
    assert files[0].read_bytes() == files[1].read_bytes() or case.spare
    ours, given = meaning(tmp_path / "ours"), meaning(tmp_path / "theirs")
    assert ours.keys() == given.keys()
    but = WHERE | case.lost | PATTERNS | (frozenset() if case.is_prompt else TASK)
    assert {key: value for key, value in ours.items() if key not in but} == {key: value for key, value in given.items() if key not in but}
    targets = ours.get("target_modules") or []
    assert sized(ours, targets) == sized(given, targets)
    assert result(backbone, inputs).equal(plain)
    torch.testing.assert_close(result(reopened(backbone, tmp_path / "ours"), inputs, case.virtual), expected, atol=1e-5, rtol=1e-5)


def test_the_table_is_whole() -> None:
    """Every type on every architecture."""
    from peft.utils import PeftType

    found = {(str(PeftType(case.config().peft_type).value), case.model) for case in CASES}
    assert found == {(kind, model) for kind in tuners for model in MODELS}
