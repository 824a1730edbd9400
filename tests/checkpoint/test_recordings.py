"""Folders that OpenDelta and the adapters library themselves wrote: what is read computes what they computed, or is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import deltatune as dt
from deltatune.checkpoint.foreign import foreign_format
from deltatune.errors import CheckpointError, DeltaError, Unsupported
from tests.checkpoint.deltas import same, state
from tests.checkpoint.fixtures.hosts import host

FIXTURES = Path(__file__).parent / "fixtures"
LIBRARIES = {"adapters": FIXTURES / "adapters-1.3.0", "opendelta": FIXTURES / "opendelta-0.3.2"}
RECORDED = [(library, key) for library, folder in LIBRARIES.items() for key in load_file(folder / "outputs.safetensors")]
REFUSED: dict[tuple[str, str], tuple[type[DeltaError], str]] = {
    ("adapters", "gpt2/par_bn"): (Unsupported, "reads the residual ahead of the norm"),
    ("adapters", "t5/compacter"): (CheckpointError, "the library leaves it out for models that are their own base, such as T5"),
}


def test_all_that_is_there_is_looked_at() -> None:
    """Every folder has its outputs, every kind the issue names is among them."""
    folders = {
        (library, str(file.parent.relative_to(folder))) for library, folder in LIBRARIES.items() for file in folder.glob("*/*/*.json")
    }
    assert folders == set(RECORDED) and len(RECORDED) == 40 and set(RECORDED) > REFUSED.keys()
    assert {key.partition("/")[2] for _, key in RECORDED} >= {"lora", "double_seq_bn", "adapter", "compacter", "prefix", "ia3", "bitfit"}


@pytest.mark.parametrize(("library", "key"), [case for case in RECORDED if case not in REFUSED])
def test_outputs_are_those_of_the_library(library: str, key: str, tmp_path: Path) -> None:
    model, inputs = host(key.partition("/")[0])
    before, folder = state(model), LIBRARIES[library] / key
    recorded = load_file(LIBRARIES[library] / "outputs.safetensors")[key]
    assert foreign_format(folder) == library
    delta = dt.load(model, folder, name="read", allow_bin=True, allow_unknown=key.endswith("compacter"))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, recorded, atol=1e-5, rtol=1e-5)
        dt.save(delta, tmp_path / "native")
        dt.detach(delta)
        assert same(state(model), before)
        assert not torch.allclose(model(**inputs).logits, recorded, atol=1e-2)
        dt.load(model, tmp_path / "native")
        torch.testing.assert_close(model(**inputs).logits, recorded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("library", "key"), REFUSED)
def test_what_is_not_the_same_here_is_refused(library: str, key: str) -> None:
    error, words = REFUSED[library, key]
    model, _ = host(key.partition("/")[0])
    with pytest.raises(error, match=words):
        dt.load(model, LIBRARIES[library] / key, allow_bin=True)
    assert not dt.deltas(model)
