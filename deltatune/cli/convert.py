"""``deltatune convert``: a delta in another form: ours, another library's, a LoRA, a LoRA for llama.cpp, or merged into its backbone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli.commands import commands
from deltatune.cli.contents import contents, is_native
from deltatune.cli.terminal import Json, facts, note, show, show_json, size, working
from deltatune.errors import CheckpointError, InvalidValue

if TYPE_CHECKING:
    from torch import nn

    from deltatune.checkpoint.record import About
    from deltatune.injection.compose import Composition
    from deltatune.injection.delta import Delta

Backbone = Annotated[str | None, typer.Option("--backbone", metavar="NAME", help="The backbone, where the folder does not name it.")]
AutoClass = Annotated[
    str | None, typer.Option("--auto-class", metavar="NAME", help="transformers' auto class to load it with, for foreign folders.")
]
NumLabels = Annotated[int | None, typer.Option("--num-labels", min=1, help="Outputs of the task head, for foreign folders.")]
AllowBin = Annotated[bool, typer.Option("--allow-bin", help="Read a foreign pickle, by torch.load(weights_only=True) alone.")]
AllowUnknown = Annotated[
    bool, typer.Option("--allow-unknown", help="Leave out fields of a foreign folder that are not known, or only matter in training.")
]
AllowForeign = Annotated[bool, typer.Option("--allow-foreign", help="Take another backbone than the delta was trained on.")]
Dequantize = Annotated[bool, typer.Option("--dequantize", help="Give a quantised backbone plain weights of the same values first.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]

BACKBONE_KEYS = ("base_model_name_or_path", "backbone_checkpoint_name", "model_name")
"""Where foreign configs name their backbone."""


@dataclass(frozen=True)
class Source:
    """Where a delta is read from, and on what terms; see the options of ``convert``."""

    folder: Path
    backbone: str | None = None
    auto_class: str | None = None
    num_labels: int | None = None
    allow_bin: bool = False
    allow_unknown: bool = False
    allow_foreign: bool = False
    dequantize: bool = False


@dataclass(frozen=True)
class Opened:
    """A delta on its backbone."""

    delta: Delta | Composition
    tokenizer: Any
    about: About
    backbone_id: str


@commands.register("convert")
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A delta of ours, a run, or a folder of another library.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where to; a folder, or a file for gguf-lora.")],
    to: Annotated[str, typer.Option(metavar="FORM", help="native, peft, merged, lora or gguf-lora.")],
    rank: Annotated[int | None, typer.Option(min=1, help="With --to lora: its rank. Left out: 8.")] = None,
    allow_left_out: Annotated[
        bool, typer.Option("--allow-left-out", help="With --to lora: do without changes of vectors, such as biases.")
    ] = False,
    backbone: Backbone = None,
    auto_class: AutoClass = None,
    num_labels: NumLabels = None,
    allow_bin: AllowBin = False,
    allow_unknown: AllowUnknown = False,
    allow_foreign: AllowForeign = False,
    dequantize: Dequantize = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a delta in another form.

    merged is a plain transformers checkpoint, which loads without deltatune. lora comes as near to any change of weights
    as its rank allows, and says how near. gguf-lora is for llama.cpp.

    deltatune convert runs/bbc out/merged --to merged
    deltatune convert someones-peft-folder out/mine --to native --backbone minilm
    deltatune convert runs/full out/small --to lora --rank 16
    """
    from deltatune.backbones.quiet import quiet
    from deltatune.checkpoint.targets import Given, target_of

    write = target_of(to)
    with quiet(), working(f"Reading `{source}` and its backbone, to write `{out}`."):
        opened = read(Source(source.expanduser(), backbone, auto_class, num_labels, allow_bin, allow_unknown, allow_foreign, dequantize))
        given = Given(opened.delta, opened.tokenizer, opened.about, opened.backbone_id, rank, allow_left_out, overwrite)
        told = write(given, out.expanduser())
    report(out.expanduser(), to, told, json)


def report(out: Path, to: str, told: Any, json: bool) -> None:
    """Say what was written."""
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    size_bytes = sum(file.stat().st_size for file in files)
    if json:
        show_json({"out": str(out), "to": to, "size_bytes": size_bytes, **told}, one_line=True)
        return
    errors = told.get("errors", {})
    worst = max(errors, key=errors.__getitem__) if errors else None
    show(
        facts(
            (to, f"{size(size_bytes)} in {out}"),
            ("relative error", f"{told['relative_error']:.3e} of the change, in the Frobenius norm" if "relative_error" in told else None),
            ("worst matrix", f"{worst}, {errors[worst]:.3e}" if worst else None),
            ("left out", ", ".join(told.get("left_out", ()))),
        )
    )


def read(source: Source) -> Opened:
    """Open the delta on its backbone.

    Raises:
        DeltaError: it or its backbone cannot be read, or they do not belong together.
    """
    opened = _native(source) if is_native(source.folder) else _foreign(source)
    return _dequantized(opened) if source.dequantize else opened


def _native(source: Source) -> Opened:
    from deltatune.checkpoint.format import read as read_record
    from deltatune.training.opening import open as open_delta

    for flag, value in (("--num-labels", source.num_labels), ("--allow-bin", source.allow_bin), ("--allow-unknown", source.allow_unknown)):
        if value:
            raise InvalidValue(f"`{flag}` is for folders of other libraries, and `{source.folder}` is one of ours. Leave it out.")
    options: dict[str, Any] = {"auto_class": source.auto_class} if source.auto_class else {}
    record = read_record(source.folder)
    _, tokenizer, delta = open_delta(source.folder, backbone=source.backbone, allow_foreign=source.allow_foreign, **options)
    return Opened(delta, tokenizer, record.about, source.backbone or record.origin.id or "")


def _foreign(source: Source) -> Opened:
    from deltatune.backbones import load_backbone, load_tokenizer
    from deltatune.checkpoint.format import load, locate
    from deltatune.checkpoint.record import About
    from deltatune.cli.skeleton import AUTO_CLASSES
    from deltatune.training.job import kind_of

    found = contents(source.folder)
    if not found.format:
        locate(source.folder)
    named = (value for config in found.configs.values() for key in BACKBONE_KEYS if isinstance(value := config.get(key), str) and value)
    name = source.backbone or next(named, None)
    if name is None:
        raise CheckpointError(f"`{source.folder}` does not name its backbone. Add --backbone NAME.")
    options: dict[str, Any] = {} if source.num_labels is None else {"num_labels": source.num_labels}
    model: nn.Module = load_backbone(name, auto_class=source.auto_class or AUTO_CLASSES[kind_of(name)], **options)
    delta = load(model, source.folder, allow_bin=source.allow_bin, allow_unknown=source.allow_unknown, allow_foreign=source.allow_foreign)
    return Opened(delta, load_tokenizer(name), About(), name)


def _dequantized(opened: Opened) -> Opened:
    """The same delta on the same backbone with plain weights."""
    import tempfile
    from dataclasses import replace

    from deltatune.backbones.dequantize import dequantize_in_place
    from deltatune.checkpoint.format import load, save
    from deltatune.injection.attach import detach

    backbone = opened.delta.backbone
    with tempfile.TemporaryDirectory(prefix="deltatune-") as folder:
        save(opened.delta, Path(folder) / "delta", unfinished=True)
        detach(opened.delta)
        if not dequantize_in_place(backbone):
            note("`--dequantize` had nothing to do: no weight of the backbone is quantised.")
        return replace(opened, delta=load(backbone, Path(folder) / "delta", allow_foreign=True))
