"""``deltatune merge``: a delta folded into its backbone, as a checkpoint that loads without deltatune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltatune.cli.commands import commands
from deltatune.cli.convert import AllowBin, AllowForeign, AllowUnknown, AutoClass, Backbone, Dequantize, NumLabels, Overwrite, convert
from deltatune.cli.terminal import Json


@commands.register("merge")
def merge(
    folder: Annotated[Path, typer.Argument(metavar="IN", help="A delta of ours, a run, or a folder of another library.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the checkpoint goes: a folder.")],
    backbone: Backbone = None,
    auto_class: AutoClass = None,
    num_labels: NumLabels = None,
    overwrite: Overwrite = False,
    dequantize: Dequantize = False,
    allow_bin: AllowBin = False,
    allow_unknown: AllowUnknown = False,
    allow_foreign: AllowForeign = False,
    json: Json = False,
) -> None:
    """Fold a delta into its backbone's weights and write a plain transformers checkpoint, tokenizer included.

    The same as deltatune convert IN OUT --to merged. Kinds that are no change of weights, such as adapters and prompts,
    are refused.

    deltatune merge runs/bbc out/bbc-merged
    """
    convert(
        folder,
        out,
        "merged",
        backbone=backbone,
        auto_class=auto_class,
        num_labels=num_labels,
        allow_bin=allow_bin,
        allow_unknown=allow_unknown,
        allow_foreign=allow_foreign,
        dequantize=dequantize,
        overwrite=overwrite,
        json=json,
    )
