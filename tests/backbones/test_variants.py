"""Controls by name: fewer layers of the same weights, or weights that were never trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deltatune.backbones import backbone_id, load_backbone, load_config, resolve
from deltatune.errors import InvalidValue, UnknownName
from deltatune.training.job import kind_of
from tests.training.tiny import folder, same

HEAD = {"auto_class": "AutoModelForSequenceClassification", "num_labels": 3}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder("bert", tmp_path_factory.mktemp("variants"))


def test_fewer_layers_are_the_lowest(tiny: str) -> None:
    whole: Any = load_backbone(tiny, **HEAD)
    part: Any = load_backbone(f"{tiny}@layers=1", **HEAD)
    assert len(part.base_model.encoder.layer) == 1
    assert same(dict(part.base_model.encoder.layer[0].state_dict()), dict(whole.base_model.encoder.layer[0].state_dict()))
    assert part.config.name_or_path == backbone_id(f"{tiny}@layers=1") == f"{Path(tiny).resolve()}@layers=1"
    assert load_config(f"{tiny}@layers=1").num_hidden_layers == 1


def test_random_weights_are_the_same_each_time_and_the_head_is_not(tiny: str) -> None:
    found: list[Any] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(load_backbone(f"{tiny}@random", **HEAD))
    first, second = found
    assert same(dict(first.base_model.state_dict()), dict(second.base_model.state_dict()))
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    pretrained: Any = load_backbone(tiny, **HEAD)
    query = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(first.base_model.state_dict()[query], pretrained.base_model.state_dict()[query])


def test_drawing_leaves_the_generator_alone(tiny: str) -> None:
    torch.manual_seed(3)
    load_backbone(f"{tiny}@random")
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def test_both_at_once(tiny: str) -> None:
    model: Any = load_backbone(f"{tiny}@random,layers=1")
    assert model.config.num_hidden_layers == 1 and model.config.name_or_path.endswith("@layers=1,random")


def test_a_shape_needs_no_file() -> None:
    small: Any = load_backbone("t5-small@random,layers=1", auto_class="AutoModelForSeq2SeqLM")
    assert (len(small.encoder.block), len(small.decoder.block), small.config.d_model) == (1, 1, 512)
    assert small.lm_head.weight is small.shared.weight
    assert kind_of("t5-small@random") == "encoder-decoder" and resolve("google-t5/t5-base@random").name == "t5-base@random"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minilm@layers=9", "asks for 9 layers, but `minilm` has 6"),
        ("minilm@layers=0", "asks for the variant `layers=0`"),
        ("minilm@half", "A variant is `random`, `layers=N`"),
        ("minilm@random,random", "asks for the variant"),
        ("@random", "asks for the variant"),
    ],
)
def test_no_such_variant(name: str, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        load_config(name)


def test_no_such_backbone_of_a_variant() -> None:
    with pytest.raises(UnknownName, match=r"No backbone is called `minilmm`\. Did you mean `minilm`"):
        load_config("minilmm@random")


def test_a_folder_with_the_mark_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a@b").mkdir()
    (tmp_path / "a@b" / "config.json").write_text("{}")
    assert resolve(tmp_path / "a@b").name == str((tmp_path / "a@b").resolve())
