"""What does not fit is an error that names it, and a failed load leaves no trace."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltatune as dt
from deltatune.checkpoint import read
from deltatune.checkpoint.bounded import Bounded
from deltatune.checkpoint.record import sealed
from deltatune.errors import CheckpointError, DeltaError, ForeignBackbone, InvalidValue, Unsupported
from deltatune.methods import BitFit, LoRA
from tests.checkpoint.deltas import backbone, same, small, state, trained
from tests.models import output

QUERY = "bert.encoder.layer.0.attention.self.query.lora_A"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A LoRA with its head, on BERT."""
    return dt.save(trained(backbone("bert")[0]), tmp_path / "d")


def deep(levels: int) -> Any:
    """A list in a list in a list ..."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the record of a saved delta."""
    data = json.loads((folder / "delta.json").read_text())
    change(data)
    (folder / "delta.json").write_bytes(sealed(data))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a saved delta, and the digest in its record with them."""
    import hashlib

    tensors = load_file(folder / "delta.safetensors")
    change(tensors)
    save_file(tensors, folder / "delta.safetensors", metadata={"format": "pt"})
    digest = hashlib.sha256((folder / "delta.safetensors").read_bytes()).hexdigest()
    edit(folder, lambda data: data["tensors"].update(sha256=digest))


def refused(folder: Path, kind: type[DeltaError] = CheckpointError, model: nn.Module | None = None, **options: Any) -> str:
    """The error of a load, which must leave the backbone as it was."""
    model = backbone("bert")[0] if model is None else model
    before, modules = state(model), [name for name, _ in model.named_modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(kind) as caught:
        dt.load(model, folder, **options)
    assert same(state(model), before)
    assert [name for name, _ in model.named_modules()] == modules
    if dt.deltas(model) == []:  # a slot keeps its hooks until its last patch goes
        assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    return str(caught.value)


def test_nothing_there(tmp_path: Path, saved: Path) -> None:
    assert "no `delta.json`" in refused(tmp_path / "nowhere")
    assert "Deltas are in" in refused(tmp_path)
    (tmp_path / "file").touch()
    assert "Give a folder that dt.save or a run wrote" in refused(tmp_path / "file")
    assert "There is no delta in" in refused(Path("a\0b"))


def test_the_folder_of_a_run(tmp_path: Path, saved: Path) -> None:
    shutil.copytree(saved, tmp_path / "run" / "delta")
    assert read(tmp_path / "run") == read(saved)
    assert dt.load(backbone("bert")[0], tmp_path / "run").name == "d"


def test_missing_tensor(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.pop(QUERY))
    error = refused(saved)
    assert f"missing: `{QUERY}` (1)" in error and "allow_missing=True" in error
    delta = dt.load(backbone("bert")[0], saved, allow_missing=True)
    assert QUERY in delta.state_dict()


def test_missing_head(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.pop("classifier.weight"))
    assert "lacks the tensors `classifier.weight`" in refused(saved)
    model, _ = backbone("bert", head=5)
    fresh = model.classifier.weight.clone()
    dt.load(model, saved, allow_missing=True)
    assert torch.equal(model.classifier.weight, fresh)


def test_unexpected_tensor(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.update(stranger=torch.zeros(2)))
    error = refused(saved)
    assert "unexpected: `stranger` (1)" in error and "allow_unexpected=True" in error
    assert dt.load(backbone("bert")[0], saved, allow_unexpected=True).name == "d"


def test_misshapen_tensor(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.update({QUERY: torch.zeros(3, 32)}))
    error = refused(saved)
    assert f"misshapen: `{QUERY}` (1)" in error and "allow_misshapen=True" in error
    assert dt.load(backbone("bert")[0], saved, allow_misshapen=True).state_dict()[QUERY].shape == (2, 32)


def test_a_head_for_other_labels(saved: Path) -> None:
    model, _ = backbone("bert")
    model.classifier = nn.Linear(32, 7)
    assert "misshapen: `classifier.bias`, `classifier.weight` (2)" in refused(saved, model=model)
    fresh = model.classifier.weight.clone()
    dt.load(model, saved, allow_misshapen=True)
    assert torch.equal(model.classifier.weight, fresh)


def test_not_finite(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors[QUERY].fill_(float("nan")))
    error = refused(saved)
    assert f"NaN or infinity in `{QUERY}`" in error
    delta = dt.load(backbone("bert")[0], saved, allow_nonfinite=True)
    with pytest.raises(CheckpointError, match="the training diverged"):
        dt.save(delta, saved.parent / "again")
    assert not (saved.parent / "again").exists()
    dt.save(delta, saved.parent / "again", allow_nonfinite=True)


def test_edited_tensors(saved: Path) -> None:
    file = saved / "delta.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert "is truncated or was edited: its SHA-256 is" in refused(saved)


@pytest.mark.parametrize("length", [0, 5, 8, 100, -1])
def test_truncated_tensors(saved: Path, length: int) -> None:
    file = saved / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    assert "truncated" in refused(saved)


@pytest.mark.parametrize("length", [0, 5, 100, -3])
def test_truncated_record(saved: Path, length: int) -> None:
    file = saved / "delta.json"
    file.write_bytes(file.read_bytes()[:length])
    assert "is truncated or was edited" in refused(saved)


def test_a_missing_file(saved: Path) -> None:
    (saved / "delta.safetensors").unlink()
    assert "`delta.safetensors` cannot be read" in refused(saved).replace(f"{saved}/", "")


@pytest.mark.parametrize("name", ["delta.json", "delta.safetensors"])
def test_a_link(saved: Path, name: str) -> None:
    (saved / name).rename(saved.parent / name)
    (saved / name).symlink_to(saved.parent / name)
    assert "is a link; delta files are read from regular files only" in refused(saved)


def test_a_header_beyond_all_bounds(saved: Path) -> None:
    (saved / "delta.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    assert "claims 1,099,511,627,776 for its header" in refused(saved)


def test_a_record_beyond_all_bounds(saved: Path) -> None:
    with (saved / "delta.json").open("ab") as file:
        file.truncate(2**30)
    assert "It is not one of ours" in refused(saved)


RECORDS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda data: data.update(stranger=1), "does not know: `stranger`"),
    (lambda data: data["tensors"].update(stranger=1), "does not know: `tensors.stranger`"),
    (lambda data: data["backbone"]["fingerprint"].update(stranger=1), "does not know: `backbone.fingerprint.stranger`"),
    (lambda data: data.pop("sites"), "lacks the key `sites`"),
    (lambda data: data["backbone"].pop("dtype"), "lacks the key `backbone.dtype`"),
    (lambda data: data.update(sites="all"), "sites = 'all', which is not of type"),
    (lambda data: data.update(format="other"), "is not a delta's record"),
    (lambda data: data.update(format_version=99), "format version 99, and this deltatune reads up to 1. Upgrade deltatune"),
    (lambda data: data.update(format_version=0), "format version 0, which never was"),
    (lambda data: data.update(method=None), "neither a delta with its tensors nor a composition"),
    (lambda data: data.update(backbone=[]), "holds list instead of an object"),
    (lambda data: data["backbone"]["fingerprint"]["samples"].update(a="b"), "malformed `backbone.fingerprint.samples`"),
    (lambda data: data["method"].update(name="lroa"), "`lroa`, which is not registered here. Did you mean `lora`"),
    (lambda data: data["method"]["fields"].update(rnak=3), "the field `rnak`, which LoRA does not know. Did you mean `rank`"),
    (lambda data: data["method"]["fields"].update(rank="8"), "has rank='8', but LoRA.rank is of type"),
    (lambda data: data["method"]["fields"].update(rank=True), "has rank=True, but LoRA.rank is of type"),
    (lambda data: data["method"]["fields"].update(rank=10**9), "asks for more than"),
    (lambda data: data["method"]["fields"].update(rank=2**63), "cannot be built"),
    (lambda data: data["method"]["fields"].update(rank=10**40), "is beyond 64 bits"),
    (lambda data: data.update(score=10**400), "is beyond 64 bits"),
    (lambda data: data.update(template=deep(100)), "nested more than 64 deep"),
    (lambda data: data.update(sites=["bert.encoder.layer.0.attention.self.qurey"]), "has no such site. Did you mean `bert.enc"),
]


@pytest.mark.parametrize(("change", "words"), RECORDS, ids=[words for _, words in RECORDS])
def test_an_edited_record(saved: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    edit(saved, change)
    assert words in refused(saved)


@pytest.mark.parametrize("change", [("alpha", 1600.0), ("score", 0.99), ("labels", ["b", "a"])], ids=lambda change: change[0])
def test_a_value_that_was_edited(change: tuple[str, Any], saved: Path) -> None:
    """It would load as well, and mean something else."""
    key, value = change
    data = json.loads((saved / "delta.json").read_text())
    (data["method"]["fields"] if key == "alpha" else data)[key] = value
    (saved / "delta.json").write_text(json.dumps(data))
    assert "delta.json` was edited" in refused(saved)
    loaded = dt.load(backbone("bert")[0], saved, allow_edited=True)
    assert loaded.method == LoRA(rank=2, alpha=value if key == "alpha" else 16.0)


def test_a_record_may_be_laid_out_anew(saved: Path) -> None:
    (saved / "delta.json").write_text(json.dumps(json.loads((saved / "delta.json").read_text())))
    assert dt.load(backbone("bert")[0], saved).method == LoRA(rank=2)


def test_records_are_read_however_deep_the_caller_stands(saved: Path) -> None:
    """What is nested as deeply as may be takes little of the stack."""
    edit(saved, lambda data: data.update(template=deep(60)))

    def at(depth: int) -> str:
        return at(depth - 1) if depth else read(saved).name

    assert at(sys.getrecursionlimit() - len(inspect.stack()) - 200) == "d"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tensors_that_are_no_weights(saved: Path, dtype: torch.dtype) -> None:
    edit_tensors(saved, lambda tensors: tensors.update({QUERY: tensors[QUERY].to(dtype)}))
    assert f"takes torch.float32 at `{QUERY}`, and the file holds {dtype}" in refused(saved)


def test_a_field_out_of_range(saved: Path) -> None:
    edit(saved, lambda data: data["method"]["fields"].update(rank=0))
    assert "`rank` must be greater than 0" in refused(saved, InvalidValue)


def test_unknown_keys_and_fields_can_be_allowed(saved: Path) -> None:
    edit(saved, lambda data: (data.update(stranger=1), data["method"]["fields"].update(stranger=2)))
    assert dt.load(backbone("bert")[0], saved, allow_unknown=True).method == LoRA(rank=2)


def test_a_newer_field_has_its_default(saved: Path) -> None:
    edit(saved, lambda data: data["method"]["fields"].pop("rank_stabilized"))
    assert read(saved).build_method() == LoRA(rank=2)


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 2}', "[]", "3", "[" * 100_000, '{"a": "\udcff"}'])
def test_no_json_of_ours(saved: Path, text: str) -> None:
    (saved / "delta.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "Copy or save the delta again" in (error := refused(saved)) or "is not a delta's record" in error


def test_another_backbone(saved: Path) -> None:
    assert "its class is RobertaForSequenceClassification instead of BertFor" in refused(saved, ForeignBackbone, backbone("roberta")[0])
    model, inputs = backbone("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.add_(0.1)
    error = refused(saved, ForeignBackbone, model)
    assert "other weights in some of its parameters" in error and "allow_foreign=True" in error
    dt.load(model, saved, allow_foreign=True)
    assert output(model, inputs).isfinite().all()


def test_another_type(saved: Path) -> None:
    error = refused(saved, ForeignBackbone, backbone("bert", dtype=torch.bfloat16)[0])
    assert "other types or shapes: `bert.embeddings.LayerNorm.bias` is bfloat16 32 instead of float32 32" in error


def test_a_site_that_a_foreign_backbone_lacks(saved: Path) -> None:
    error = refused(saved, CheckpointError, backbone("roberta")[0], allow_foreign=True)
    assert "sits at `bert.encoder.layer.0.attention.self.query`" in error and "has no such site" in error


def test_another_vocabulary(saved: Path) -> None:
    model, _ = backbone("bert")
    model.resize_token_embeddings(120, mean_resizing=False)
    error = refused(saved, ForeignBackbone, model)
    assert "`bert.embeddings.word_embeddings.weight` has 120 vocabulary rows instead of 101" in error
    assert dt.load(model, saved, allow_vocabulary=True).name == "d"


def test_names(saved: Path) -> None:
    model, _ = backbone("bert")
    first = dt.load(model, saved)
    assert "`d` is attached already" in refused(saved, InvalidValue, model)
    assert "cannot name a delta" in refused(saved, InvalidValue, model, name="../d")
    second = dt.load(model, saved, name="second")
    assert dt.deltas(model) == [first, second]


def test_a_failed_load_beside_another_delta(saved: Path) -> None:
    model, inputs = backbone("bert")
    trained(model, "bitfit", name="other")
    edit_tensors(saved, lambda tensors: tensors.update({"classifier.bias": torch.zeros(9)}))
    with torch.no_grad():
        before = output(model, inputs)
        refused(saved, model=model)
        assert torch.equal(output(model, inputs), before)


def test_a_detached_delta_cannot_be_saved(tmp_path: Path) -> None:
    delta = trained(backbone("bert")[0])
    dt.detach(delta)
    with pytest.raises(Unsupported, match="was detached"):
        dt.save(delta, tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("method", ["lora", "bitfit"])
@pytest.mark.parametrize("format", ["native", "peft"])
def test_a_delta_without_values_cannot_be_saved(method: str, format: str, tmp_path: Path) -> None:
    model, _ = backbone("bert")
    delta = dt.attach(model, small(method), name="d")
    model.to("meta")
    with pytest.raises(Unsupported, match=r"on meta\. Save from plain tensors"):
        dt.save(delta, tmp_path / "d", format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 2**64, deep(65), {1: 2}, {"a": object()}])
def test_what_is_no_json_cannot_be_saved(tmp_path: Path, value: Any) -> None:
    delta = trained(backbone("bert")[0])
    with pytest.raises(InvalidValue, match="cannot be saved"):
        dt.save(delta, tmp_path / "d", template=value)
    assert list(tmp_path.iterdir()) == []


def test_complex_tensors_cannot_be_saved(tmp_path: Path) -> None:
    delta = dt.attach(nn.Sequential(nn.Linear(2, 2)), BitFit(), where="0", name="d")
    delta.entries[0].patch.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(Unsupported, match=r"`0\.bias\.phase` cannot go into a delta file: it is a Tensor of torch\.complex64"):
        dt.save(delta, tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_memory_is_bounded() -> None:
    with pytest.raises(CheckpointError, match="x asks for more than 1,000 bytes"), Bounded(1000, "x"):
        torch.zeros(100), torch.randn(200, generator=torch.Generator())
    with Bounded(1000, "x") as bound:
        torch.ones(10, dtype=torch.int8)
    assert bound.used == 10
