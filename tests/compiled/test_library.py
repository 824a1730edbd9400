"""Compiling says what is missing, and leaves nothing half done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltatune.compiled.library import compile_library, is_compiled, library_file
from deltatune.errors import OutputError, Unsupported


@pytest.mark.usefixtures("compiled")
def test_it_is_compiled_once() -> None:
    before = library_file().stat().st_mtime_ns
    assert compile_library() == library_file() and library_file().stat().st_mtime_ns == before
    assert is_compiled() and torch.ops.deltatune.add_rows_ is not None
    assert [path.name for path in library_file().parent.iterdir()] == [library_file().name]


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unsupported, match="no C\\+\\+ compiler was found"):
        compile_library()


def test_a_compiler_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(Unsupported, match="could not compile"):
        compile_library()
    assert not list(library_file().parent.iterdir())


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("here")
    monkeypatch.setenv("DELTATUNE_CACHE", str(file))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(OutputError, match="DELTATUNE_CACHE"):
        compile_library()
    assert file.read_text() == "here"
