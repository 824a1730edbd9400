"""Strictness: a config or a file of PEFT's that cannot be taken as it is ends in our error and leaves the backbone alone."""

from __future__ import annotations

import json
import random
import re
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import deltatune as dt
from deltatune.checkpoint.foreign import format_of, formats
from deltatune.checkpoint.peft import expressions
from deltatune.errors import CheckpointError, DeltaError, InvalidValue, Unsupported
from deltatune.methods import LoRA
from tests.checkpoint.peft.cases import Case, lora, reopened, result, save, theirs
from tests.conformance.cells import fresh

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of PEFT's."""
    place = tmp_path_factory.mktemp("peft") / "some lora"
    save(theirs(Case("lora", "bert", lambda: lora(target_modules=["query"])), fresh("bert")[0]), place)
    return place


def changed(folder: Path, place: Path, **fields: Any) -> Path:
    """A copy with other fields in its config."""
    shutil.copytree(folder, place)
    config = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps({**config, **fields}))
    return place


def test_it_is_known_and_named_after_its_folder(folder: Path) -> None:
    assert format_of(folder) == "peft" and "peft" in formats
    backbone, _ = fresh("bert")
    assert dt.load(backbone, folder).name == "some-lora"
    with pytest.raises(InvalidValue, match="some-lora"):
        dt.load(backbone, folder)
    assert not dt.load(backbone, folder, name="second", enable=False).enabled


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_qalora": True}, "use_qalora = True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication = .*other layers"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "corda.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"init_lora_weights": "olora", "use_dora": True}, "'olora' with use_dora"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"arrow_config": {"a": 1}}, "arrow_config"),
        ({"peft_type": "RANDLORA"}, "peft_type = 'RANDLORA'.*LORA"),
        ({"peft_type": None}, "peft_type = None"),
    ],
)
def test_fields_that_we_cannot_do(folder: Path, tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    backbone, _ = fresh("bert")
    with pytest.raises(Unsupported, match=words):
        dt.load(backbone, changed(folder, tmp_path / "new", **fields), name="read", allow_unknown=True)
    assert not dt.deltas(backbone)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": "four"}, "r = 'four'"),
        ({"r": True}, "r = True"),
        ({"lora_alpha": float("inf")}, "lora_alpha = inf"),
        ({"lora_alpha": 10**400}, "beyond 64 bits"),
        ({"rank_pattern": {"query": "x"}}, "rank_pattern.query = 'x'"),
        ({"rank_pattern": {"query": None}}, "rank_pattern.query = None"),
        ({"alpha_pattern": {"query": {}}}, "alpha_pattern.query = {}"),
        ({"bias": "some"}, "bias = 'some'"),
        ({"r": 3}, "misshapen"),
        ({"rank_pattern": {"(": 3}}, "malformed expression"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"target_modules": ["query", "value"]}, "no tensors for `bert.encoder.layer.0.attention.self.value`"),
        ({"target_modules": ["0.attention.self.query"]}, "does not target"),
        ({"layers_to_transform": [0]}, "does not target"),
        ({"modules_to_save": ["pooler"]}, "lacks `bert.pooler`"),
        ({"trainable_token_indices": [1]}, "lacks the rows"),
        ({"some_new_field": 5}, "some_new_field = 5.*allow_unknown"),
        ({"lora_bias": True}, "lora_B.bias` does not go with lora_bias = True"),
        ({"init_lora_weights": "mica"}, "'mica', where lora_B does not train.*allow_unknown"),
        ({"use_dora": True, "lora_dropout": 0.1}, "lora_dropout = 0.1.*allow_unknown|missing"),
    ],
)
def test_fields_that_do_not_fit(folder: Path, tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    backbone, _ = fresh("bert")
    with pytest.raises(CheckpointError, match=words):
        dt.load(backbone, changed(folder, tmp_path / "new", **fields), name="read")
    assert not dt.deltas(backbone)


EXPRESSIONS = ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save"]
ENDLESS = ["(a|a)*$", "(a|aa)+$", "((a?){3}){3}(a*)*(a|a)*$"]


def named_badly() -> nn.Module:
    """Modules whose names keep such an expression busy for longer than there is time."""
    return nn.Sequential(OrderedDict({"a" * 100 + "!" + "b" * k: nn.Sequential(nn.Sequential(nn.Linear(4, 4))) for k in range(3)}))


@pytest.mark.parametrize("expression", ENDLESS)
@pytest.mark.parametrize("field", EXPRESSIONS)
def test_expressions_that_would_take_for_ever(field: str, expression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "MAX_SECONDS", 0.05)
    model = named_badly()
    delta = dt.attach(model, LoRA(rank=2), "*", name="ours")
    dt.save(delta, tmp_path / "lora", format="peft")
    dt.detach(delta)
    expression = expression.removesuffix("$") if field == "layers_pattern" else expression  # there, a number comes behind it
    given: Any = {"rank_pattern": {expression: 2}, "alpha_pattern": {expression: 2}, "modules_to_save": [expression]}.get(field, expression)
    beside = {"layers_to_transform": [0]} if field == "layers_pattern" else {}
    with pytest.raises(CheckpointError, match=r"takes more than 0.05 seconds"):
        dt.load(model, changed(tmp_path / "lora", tmp_path / "new", **{field: given}, **beside))
    assert not dt.deltas(model)


HUGE = ["((a{0,5000}){0,5000}){0,5000}", "(?:(?:a?){1000}){1000}", "a" * 300_000, "(" * 50_000, "a{9999999999}"]


@pytest.mark.parametrize("expression", HUGE)
def test_expressions_that_would_take_all_memory(expression: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"stands for more than 262,144 letters|malformed expression"):
        dt.load(fresh("bert")[0], changed(folder, tmp_path / "new", target_modules=expression), name="read")


@pytest.mark.parametrize(
    ("expression", "text"), [(r"a{b}", "a{b}"), (r"(?:ab){e<=2}", "ab{e<=2}"), (r"\{x\}{2}", "{x}}"), (r"[{}]{2}", "{}"), ("a{,2}", "aa")]
)
def test_braces_mean_what_they_mean_to_python(expression: str, text: str) -> None:
    found = expressions.Expressions(Path("config"))
    assert re.fullmatch(expression, text) and found.fits(expression, text)
    assert not found.fits(expression, text + "x") and not found.fits(expression, "ax")


@pytest.mark.parametrize("fields", [{"r": 0}, {"r": -4}, {"rank_pattern": {"query": 0}}, {"lora_alpha": float("nan")}])
def test_fields_out_of_their_range(folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    backbone, _ = fresh("bert")
    with pytest.raises(DeltaError, match=r"greater than 0|lora_alpha = nan"):
        dt.load(backbone, changed(folder, tmp_path / "new", **fields), name="read")
    assert not dt.deltas(backbone)


def test_a_config_that_says_something_twice(folder: Path, tmp_path: Path) -> None:
    place = changed(folder, tmp_path / "new")
    (place / CONFIG).write_text((place / CONFIG).read_text().replace('"r": 4', '"r": 8, "r": 4'))
    with pytest.raises(CheckpointError, match="a key stands twice"):
        dt.load(fresh("bert")[0], place)


def test_an_adapter_in_a_folder_below_is_pointed_at(tmp_path: Path) -> None:
    """PEFT saves one that is not called ``default`` there."""
    model = theirs(Case("lora", "bert", lambda: lora(target_modules=["query"])), fresh("bert")[0])
    save(model, tmp_path / "both" / "mine")
    with pytest.raises(CheckpointError, match=r"Deltas are in `.*mine`"):
        dt.load(fresh("bert")[0], tmp_path / "both")


def test_unknown_fields_may_be_left_out(folder: Path, tmp_path: Path) -> None:
    backbone, inputs = fresh("bert")
    delta = dt.load(backbone, folder, name="read")
    expected = result(backbone, inputs)
    dt.detach(delta)
    dt.load(backbone, changed(folder, tmp_path / "new", some_new_field=5), name="read", allow_unknown=True)
    assert result(backbone, inputs).equal(expected)


def test_a_dropout_we_lack_is_named(tmp_path: Path) -> None:
    backbone, inputs = fresh("bert")
    model = theirs(Case("dora", "bert", lambda: lora(target_modules=["query"], use_dora=True, lora_dropout=0.1)), backbone)
    save(model, tmp_path / "dora")
    with pytest.raises(CheckpointError, match=r"lora_dropout = 0\.1"):
        dt.load(backbone, tmp_path / "dora")
    dt.load(backbone, tmp_path / "dora", allow_unknown=True)
    torch.testing.assert_close(result(backbone, inputs), result(model, inputs), atol=1e-5, rtol=1e-5)


def test_tensors_are_checked(folder: Path, tmp_path: Path) -> None:
    good = load_file(folder / WEIGHTS)
    first = next(iter(sorted(good)))

    def refused(words: str, tensors: dict[str, torch.Tensor]) -> None:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folder, place)
        save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
        backbone, _ = fresh("bert")
        with pytest.raises(CheckpointError, match=words):
            dt.load(backbone, place, name="read")
        assert not dt.deltas(backbone)

    refused("missing", {name: tensor for name, tensor in good.items() if name != first})
    refused("no place here", good | {"stray": torch.ones(1)})
    refused("no place here", good | {first.replace("lora_A", "lora_C"): torch.ones(1)})
    refused("no place here", good | {first.replace("layer.0", "layer.7"): good[first].clone()})
    refused("misshapen", good | {first: good[first][:, :-1].contiguous()})
    refused("NaN", good | {first: good[first] * float("nan")})
    refused("none of the tensors", {"stray": torch.ones(1)})


def test_another_backbone(folder: Path) -> None:
    backbone, _ = fresh("llama")
    with pytest.raises(CheckpointError, match="no such module"):
        dt.load(backbone, folder, name="read")


def test_pickles_only_where_allowed(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "bin"
    shutil.copytree(folder, place)
    torch.save(load_file(place / WEIGHTS), place / "adapter_model.bin")
    (place / WEIGHTS).unlink()
    backbone, inputs = fresh("bert")
    with pytest.raises(CheckpointError, match="allow_bin"):
        dt.load(backbone, place)
    delta = dt.load(backbone, place, allow_bin=True)
    found = result(backbone, inputs)
    dt.detach(delta)
    dt.load(backbone, folder)
    assert found.equal(result(backbone, inputs))
    evil, _ = fresh("bert")
    torch.save({"a": shutil.rmtree}, place / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="tensors alone"):
        dt.load(evil, place, allow_bin=True)
    torch.save([1], place / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="more than tensors"):
        dt.load(evil, place, allow_bin=True)
    (place / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        dt.load(evil, place, allow_bin=True)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_pickles_that_stand_for_more_than_they_hold(folder: Path, tmp_path: Path) -> None:
    """Views of one number, sparse tensors and compressed archives would take gigabytes, or none of our checks would see through them."""
    place, good = tmp_path / "bin", load_file(folder / WEIGHTS)
    shutil.copytree(folder, place)
    (place / WEIGHTS).unlink()
    first, *rest = good

    def refused(words: str, tensor: torch.Tensor) -> None:
        torch.save({name: good[name] for name in rest} | {first: tensor}, place / "adapter_model.bin")
        with pytest.raises(CheckpointError, match=words):
            dt.load(fresh("bert")[0], place, allow_bin=True)

    refused("one by one", torch.ones(1).expand(10**6, 10**7))
    refused("one by one", torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**6, 10**7)))
    refused("one by one", torch.empty(10**6, 10**7, device="meta"))
    torch.save(good, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(place / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(CheckpointError, match="is compressed"):
        dt.load(fresh("bert")[0], place, allow_bin=True)


def test_names_without_end(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "long"
    shutil.copytree(folder, place)
    save_file(load_file(folder / WEIGHTS) | {"base_model.model." + "a." * 10**6: torch.ones(1)}, place / WEIGHTS)
    with pytest.raises(CheckpointError, match="has a name of 2,000,017 letters"):
        dt.load(fresh("bert")[0], place)


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        place = tmp_path / name
        shutil.copytree(folder, place)
        (place / name).unlink()
        (place / name).symlink_to(folder / name)
        with pytest.raises(CheckpointError, match="link"):
            dt.load(fresh("bert")[0], place)


def test_damaged_files_end_in_our_errors(folder: Path, tmp_path: Path) -> None:
    """Bytes changed, cut and inserted at random places of either file: a load works, or says why not, and never half-attaches."""
    backbone, inputs = fresh("bert")
    plain = result(backbone, inputs)
    draw = random.Random(0)
    place = tmp_path / "damaged"
    shutil.copytree(folder, place)
    originals = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    failed = 0
    for _ in range(60):
        name = draw.choice([CONFIG, WEIGHTS])
        content = bytearray(originals[name])
        at = draw.randrange(min(len(content), 2000))
        match draw.randrange(3):
            case 0:
                content[at] = draw.randrange(256)
            case 1:
                del content[at : at + draw.randrange(1, 40)]
            case _:
                content[at:at] = draw.randbytes(draw.randrange(1, 8))
        (place / name).write_bytes(content)
        try:
            dt.detach(dt.load(backbone, place, name="read"))
        except DeltaError:
            failed += 1
        assert not dt.deltas(backbone)
        (place / name).write_bytes(originals[name])
    assert failed > 20
    assert result(backbone, inputs).equal(plain)


def test_a_shira_whose_places_lie_outside_is_refused(tmp_path: Path) -> None:
    backbone, _ = fresh("bert")
    save(theirs(Case("shira", "bert", lambda: peft.ShiraConfig(r=2, target_modules=["query"])), backbone), tmp_path / "shira")
    tensors = load_file(tmp_path / "shira" / WEIGHTS)
    broken = {name: tensor + 1000 if name.endswith("indices") else tensor for name, tensor in tensors.items()}
    save_file(broken, tmp_path / "shira" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="outside the weight"):
        dt.load(backbone, tmp_path / "shira")


def test_a_shira_without_a_seed_keeps_its_places_in_our_format(tmp_path: Path) -> None:
    backbone, inputs = fresh("bert")
    save(theirs(Case("shira", "bert", lambda: peft.ShiraConfig(r=2, target_modules=["query"])), backbone), tmp_path / "shira")
    delta = dt.load(backbone, tmp_path / "shira")
    expected = result(backbone, inputs)
    dt.save(delta, tmp_path / "ours")
    dt.detach(delta)
    dt.load(backbone, tmp_path / "ours")
    assert result(backbone, inputs).equal(expected)


@pytest.mark.parametrize(
    ("targets", "inputs"),
    [(["key", "value", "output.dense"], ["output.dense"]), (["key", "output.dense"], []), (["query", "0.output.dense"], ["query"])],
)
def test_an_ia3_at_either_side(targets: list[str], inputs: list[str], tmp_path: Path) -> None:
    """The first is PEFT's default for BERT, where ``output.dense`` is in the attention, too."""
    backbone, batch = fresh("bert")
    config = lambda: peft.IA3Config(target_modules=targets, feedforward_modules=inputs)  # noqa: E731
    model = theirs(Case("ia3", "bert", config), backbone)
    save(model, tmp_path / "theirs")
    expected = result(model, batch)
    delta = dt.load(backbone, tmp_path / "theirs")
    torch.testing.assert_close(result(backbone, batch), expected, atol=1e-5, rtol=1e-5)
    dt.save(delta, tmp_path / "ours", format="peft")
    dt.save(delta, tmp_path / "native")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    dt.detach(delta)
    torch.testing.assert_close(result(reopened(backbone, tmp_path / "ours"), batch), expected, atol=1e-5, rtol=1e-5)
    dt.load(backbone, tmp_path / "native")
    torch.testing.assert_close(result(backbone, batch), expected, atol=1e-5, rtol=1e-5)


def test_an_ia3_at_both_sides_of_one_role_is_refused(tmp_path: Path) -> None:
    backbone, _ = fresh("bert")
    config = lambda: peft.IA3Config(target_modules=["query"], feedforward_modules=r".*\.0\..*query")  # noqa: E731
    save(theirs(Case("ia3", "bert", config), backbone), tmp_path / "ia3")
    with pytest.raises(Unsupported, match=r"layer.0.attention.self.query` \(feedforward_modules\), and the output of others"):
        dt.load(backbone, tmp_path / "ia3")
