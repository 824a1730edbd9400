"""The library's messages as the command line says them: a keyword by its option, a call by its command."""

from __future__ import annotations

import inspect
import re

from deltatune.cli.tune import tune

OPTIONS = "|".join(name.rstrip("_") for name in inspect.signature(tune).parameters)

PYTHON = {
    r"dt\.find_sites(\(backbone\))?": lambda found: "`deltatune inspect --backbone NAME`",
    rf"`({OPTIONS})=([^`]+)`": lambda found: f"`{_option(found[1], found[2])}`",
    rf"(?<![\w(,])({OPTIONS})=(True)\b": lambda found: f"`{_option(found[1], found[2])}`",
    rf"The setting `({OPTIONS})`": lambda found: f"The option `{_option(found[1], 'True')}`",
}
"""What a message says to readers of Python, and how it is said to those of the help."""


def spoken(message: str) -> str:
    """The message with options and commands in place of Python's keywords and calls.

    >>> spoken("Write `layers='top:3'`, or overwrite it (`overwrite=True`). List the sites with dt.find_sites(backbone).")
    'Write `--layers top:3`, or overwrite it (`--overwrite`). List the sites with `deltatune inspect --backbone NAME`.'
    >>> spoken("The setting `max_steps` is 0. LoRA(rank=0) was asked for; `rank` must be greater than 0.")
    'The option `--max-steps` is 0. LoRA(rank=0) was asked for; `rank` must be greater than 0.'
    """
    for python, said in PYTHON.items():
        message = re.sub(python, said, message)
    return message


def _option(name: str, value: str) -> str:
    """A keyword as the option it is: a switch stands alone, and numbers have commas between them."""
    flag = f"--{name.replace('_', '-')}"
    plain = re.sub(r"""['"()\[\]]""", "", value).replace(", ", ",")
    return flag if value == "True" else f"{flag} {plain}"
