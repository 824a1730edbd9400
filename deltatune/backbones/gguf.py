"""Convert a GGUF file once to a folder that ``from_pretrained`` reads, and keep it in deltatune's cache."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from deltatune.backbones.quiet import quiet
from deltatune.compiled.cache import cache_folder
from deltatune.errors import CheckpointError, OutputError, missing_extra

_RECIPE = 1  # raise it when the conversion changes, so that folders of an older one are not used


def converted(parts: Sequence[Path], *, name: str) -> Path:
    """The folder with the fp32 safetensors, config and tokenizer of a GGUF file, made if it is not there yet.

    The folder's name holds the hash of the file, so another file is another folder. It appears by one rename when it
    is complete: a process that dies halfway leaves nothing that a later one would read, and of two processes that
    convert at the same time one wins.

    Args:
        parts: the file, or the chunks of one in their order.
        name: in front of the hash, for people.

    Raises:
        CheckpointError: the file is not a GGUF file that transformers reads.
        OutputError: the cache cannot be written.
        MissingExtra: the package ``gguf`` is not installed.
    """
    target = cache_folder() / "backbones" / f"{name}-{_digest(parts)[:16]}-v{_RECIPE}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
            folder = Path(scratch) / "backbone"
            _convert(_joined(parts, Path(scratch)), folder)
            _publish(folder, target)
    except (OSError, SafetensorError) as cause:
        raise OutputError(
            f"The backbone `{name}` could not be converted into `{target.parent}`: {cause}. "
            "Free some space, or name a folder you can write to in DELTATUNE_CACHE."
        ) from cause
    return target


def converted_from(folder: Path) -> str | None:
    """The name under which ``converted`` made this folder; None if it did not."""
    if folder.parent != cache_folder() / "backbones":
        return None
    return folder.name.rsplit("-", 2)[0]


def _digest(parts: Sequence[Path]) -> str:
    return _digest_of(tuple((part, part.stat().st_size, part.stat().st_mtime_ns) for part in parts))


@functools.cache
def _digest_of(parts: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in parts:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _joined(parts: Sequence[Path], scratch: Path) -> Path:
    if len(parts) == 1:
        return parts[0]
    whole = scratch / "whole.gguf"
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as chunk:
                shutil.copyfileobj(chunk, out, 1 << 20)
    return whole


def _publish(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first, with the same bytes
            raise


def _convert(file: Path, folder: Path) -> None:
    with file.open("rb") as head:
        if head.read(4) != b"GGUF":
            raise CheckpointError(
                f"`{file.name}` is not a GGUF file: it does not begin with the letters GGUF. Install the package or copy the file again."
            )
    with quiet(), redirect_stderr(io.StringIO()):  # the loader's progress bar listens to no setting
        try:
            import gguf  # noqa: F401  transformers' own message does not name our extra
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as cause:
            raise missing_extra("gguf", "gguf") from cause
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as cause:  # readers and tokenizers raise whatever a damaged file leads them to
            raise CheckpointError(
                f"transformers cannot read `{file.name}`: {cause}. The file may be truncated; install or copy it again."
            ) from cause
        _mend(model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    note = folder / "source.json"
    note.write_text(json.dumps({"file": file.name, "recipe": _RECIPE}))
    for written in folder.iterdir():  # safetensors writes files that only their owner can read
        written.chmod(note.stat().st_mode)


def _mend(model: Any, tokenizer: Any) -> None:
    """What GGUF does not carry over: clean floats, the maximal length, a pad token; and traces of the GGUF loader go."""
    config = model.config
    for field, value in config.to_dict().items():
        if isinstance(value, float):
            setattr(config, field, _shortest(value))
    for trace in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.__dict__.pop(trace, None)
    model.__dict__.pop("hf_quantizer", None)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = config.max_position_embeddings


def _shortest(value: float) -> float:
    """1e-05 for 9.999999747378752e-06: the shortest decimal with the same float32."""
    import numpy

    return float(str(numpy.float32(value)))
