"""Load a backbone and its tokenizer by name: the one place where deltatune calls ``from_pretrained``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from deltatune.backbones.gguf import converted
from deltatune.backbones.quantize import quantize_in_place
from deltatune.backbones.quiet import quiet
from deltatune.backbones.resolve import Resolved, hub_answers, resolve, unreachable
from deltatune.backbones.variants import drawn
from deltatune.errors import CheckpointError, InvalidValue, UnknownName, Unsupported, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Quantize = Literal["int8", "nf4"]

NOTHING_NEW: dict[str, Any] = {"missing_keys": [], "mismatched_keys": []}
"""The report on a model of random weights, where nothing was to be found."""


def load_backbone(
    name: str | os.PathLike[str],
    *,
    auto_class: str = "AutoModel",
    num_labels: int | None = None,
    label_names: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    new_head: bool = False,
    trained_head: bool = False,
    quantize: Quantize | None = None,
    device_map: str | dict[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """The pretrained model ``name``, in eval mode.

    >>> backbone = load_backbone("minilm", auto_class="AutoModelForSequenceClassification", num_labels=5)  # doctest: +SKIP

    Args:
        name: alias, local folder, GGUF file or hub id, with ``@random`` or ``@layers=N`` behind it for a control.
        auto_class: transformers' auto class; it decides the head, which is new where the file has none.
        num_labels: outputs of a classification head.
        label_names: written into the config as ``id2label``; sets ``num_labels``.
        dtype: of the parameters.
        new_head: drop a head that the file holds in another size than the labels need, and make a new one.
        trained_head: refuse a backbone whose file lacks a part of the head, as of a masked language model.
        quantize: ``int8`` (torchao, weights only) or ``nf4`` (bitsandbytes) for the linear layers of the file; new heads stay as they are.
        device_map: as in transformers.
        options: further arguments of ``from_pretrained``, such as ``attn_implementation`` or fields of the config.

    Raises:
        UnknownName: nobody knows the name, the auto class, or the hub id.
        MissingExtra: the package of the backbone or of the quantiser is not installed.
        CheckpointError: the files cannot be read, or lack weights of the backbone itself.
        Unsupported: a trained head was asked for, and the file has none.
        InvalidValue: unknown ``quantize``, labels that contradict each other, or a head of another size in the file.
    """
    if quantize not in (None, "int8", "nf4"):
        raise InvalidValue(f"`quantize` is `{quantize}`; it can be `int8`, `nf4` or nothing.")
    labels = _label_options(num_labels, label_names)
    resolved = resolve(name)
    with quiet():
        factory = _auto_class(auto_class)
        config = _config(resolved, **labels)
        if device_map is not None:
            options["device_map"] = device_map
        model: Any
        if resolved.variant.random:
            model, report = drawn(factory, config, dtype, **options), NOTHING_NEW
        else:
            loading = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # both are looked at below
            model, report = _call(resolved, factory, source_of(resolved), config=config, dtype=dtype, **loading, **options)
        if str(resolved.variant):
            model.config.name_or_path = model.name_or_path = resolved.name  # transformers would name the whole backbone
        new = _new_parameters(resolved, model, report)
        if trained_head and new:
            raise Unsupported(
                f"The file of `{resolved.name}` has no pretrained head for {type(model).__name__} ({len(new)} of its weights would be new, "
                f"such as {min(new)}). Choose a backbone that was saved with it, or another framing."
            )
        if not new_head:
            _check_head(resolved, report)
        if quantize is not None and quantize_in_place(model, quantize, skip=new) == 0:
            raise Unsupported(
                f"`quantize={quantize}` was asked for, but `{resolved.name}` has no `nn.Linear` to quantise ({type(model).__name__} has "
                "other modules, such as GPT-2's `Conv1D`). Leave it out, or choose another backbone."
            )
    return model.eval()  # type: ignore[no-any-return]


def load_tokenizer(name: str | os.PathLike[str], **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of ``name``, always with a pad token and a true ``model_max_length``.

    Raises:
        UnknownName: nobody knows the name or the hub id.
        MissingExtra: the package of the backbone is not installed.
    """
    resolved = resolve(name)
    with quiet():
        source = source_of(resolved)
        tokenizer = _read(resolved, "AutoTokenizer", source, **options)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.model_max_length > 10**9:  # transformers' way of saying that the file does not tell
            positions = getattr(load_config(name), "max_position_embeddings", None)
            tokenizer.model_max_length = positions or tokenizer.model_max_length
    return tokenizer  # type: ignore[no-any-return]


def load_config(name: str | os.PathLike[str], **options: Any) -> PreTrainedConfig:
    """The configuration of ``name``, without reading any weight.

    Raises:
        UnknownName: nobody knows the name or the hub id.
        MissingExtra: the package of the backbone is not installed.
    """
    resolved = resolve(name)
    with quiet():
        return _config(resolved, **options)


def _config(resolved: Resolved, **options: Any) -> PreTrainedConfig:
    """The configuration; of random weights, from the catalogue where it knows the shape, so that no file is needed."""
    import transformers

    shape = resolved.backbone.shape if resolved.backbone is not None and resolved.variant.random else {}
    if shape:
        config: PreTrainedConfig = transformers.AutoConfig.for_model(**shape, **options)
    else:
        config = _read(resolved, "AutoConfig", source_of(resolved), **options)
    _give_pad_token(config)
    resolved.variant.shape(resolved.name.removesuffix(f"@{resolved.variant}"), config)
    return config


def source_of(resolved: Resolved) -> str:
    """What ``from_pretrained`` takes; a GGUF file is converted first, once."""
    if resolved.source is not None:
        return resolved.source
    return str(converted(resolved.gguf, name=resolved.backbone.name if resolved.backbone else resolved.gguf[0].stem))


def _label_options(num_labels: int | None, label_names: Sequence[str]) -> dict[str, Any]:
    if not label_names:
        return {} if num_labels is None else {"num_labels": num_labels}
    if num_labels not in (None, len(label_names)):
        raise InvalidValue(
            f"`num_labels` is {num_labels}, but {len(label_names)} label names were given: {', '.join(label_names)}. Give one of the two."
        )
    names = dict(enumerate(label_names))
    return {"num_labels": len(names), "id2label": names, "label2id": {label: index for index, label in names.items()}}


def _auto_class(name: str) -> Any:
    import transformers

    known = [entry for entry in dir(transformers) if entry.startswith("AutoModel")]
    if name not in known:
        raise UnknownName(f"transformers has no auto class `{name}`. {nearest(name, known)}")
    return getattr(transformers, name)


def _read(resolved: Resolved, auto_class: str, source: str, **options: Any) -> Any:
    import transformers

    return _call(resolved, getattr(transformers, auto_class), source, **options)


def _call(resolved: Resolved, factory: Any, source: str, **options: Any) -> Any:
    """``factory.from_pretrained``, with a missing or unreadable source told in our words."""
    if resolved.source is not None and not os.path.isdir(source):
        options.setdefault("local_files_only", not hub_answers())
    try:
        return factory.from_pretrained(source, **options)
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as cause:  # broken files make transformers, safetensors and tokenizers raise nearly anything
        if isinstance(cause, OSError) and not os.path.isdir(source):
            raise unreachable(resolved, cause) from cause
        said = re.split(r"[.:]?\s*\n|\.\s", str(cause).strip())[0].rstrip(".")  # the first sentence: what follows is advice for others
        raise CheckpointError(
            f"The backbone `{source}` cannot be read: {type(cause).__name__}: {said}. Copy or install it again; "
            "if you gave options for loading it, check them."
        ) from cause


def _give_pad_token(config: PreTrainedConfig) -> None:
    """Decoders often have none, and their classification heads look for it to find the last real token."""
    if getattr(config, "pad_token_id", None) is None:
        end = getattr(config, "eos_token_id", None)
        config.pad_token_id = end[0] if isinstance(end, list) else end


def _new_parameters(resolved: Resolved, model: nn.Module, report: dict[str, Any]) -> frozenset[str]:
    """Names of the parameters that are new: the head's, where the file has none or one of another size.

    Raises:
        CheckpointError: something of the backbone itself is among them.
    """
    new = frozenset(report["missing_keys"]) | {key for key, *_ in report["mismatched_keys"]}
    prefix = getattr(model, "base_model_prefix", "")
    is_body = not (prefix and hasattr(model, prefix))
    lacking = sorted(key for key in new if (is_body or key.startswith(f"{prefix}.")) and "pooler" not in key)  # some are saved without one
    if lacking:
        raise CheckpointError(
            f"The file of `{resolved.name}` does not fit {type(model).__name__}: {len(lacking)} weights of the backbone are missing or "
            f"have another shape ({', '.join(lacking[:3])}). Check that the folder is complete and that `auto_class` and the config fit it."
        )
    return new


def _check_head(resolved: Resolved, report: dict[str, Any]) -> None:
    """A trained head is not dropped unasked.

    Raises:
        InvalidValue: the file's head is of another size.
    """
    wrong = sorted(report["mismatched_keys"])
    if wrong:
        found, wanted = next(((there[0], here[0]) for _, there, here in wrong if there[0] != here[0]), wrong[0][1:])
        raise InvalidValue(
            f"`{resolved.name}` holds a trained head of {found} outputs ({', '.join(key for key, *_ in wrong)}), but {wanted} are wanted. "
            "Choose labels that fit it, or give it a fresh head (`new_head=True`)."
        )
