"""Experiment trackers by name: transformers has them, each with a package of its own."""

from __future__ import annotations

from collections.abc import Sequence

from deltatune.errors import MissingExtra, UnknownName, nearest
from deltatune.training.borrowed import trainer_modules


def check_trackers(names: Sequence[str]) -> None:
    """Make sure that these trackers can report, before anything is loaded or written.

    Raises:
        UnknownName: transformers has no tracker of that name.
        MissingExtra: the tracker's package is not installed.
    """
    if not names:
        return
    with trainer_modules():
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

        installed = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UnknownName(f"transformers has no experiment tracker `{name}`. {nearest(name, INTEGRATION_TO_CALLBACK)}")
        if name not in installed:
            found = f"installed here: {', '.join(installed)}" if installed else "none is installed here"
            raise MissingExtra(
                f"The experiment tracker `{name}` was asked for, but its package is not installed ({found}). "
                f"Install it, as with `pip install {name}`, or leave `report_to` out; metrics.json and curve.png are written anyway."
            )
