"""The architectures deltatune knows by data. An architecture it does not know is inferred from names, classes and shapes.

A third party registers its own through an entry point of the group ``deltatune.architectures``, or by calling
``architectures.register("name")(Architecture(...))``.
"""

from __future__ import annotations

from deltatune.registry import Registry
from deltatune.structure.architecture import Architecture
from deltatune.structure.architectures import bart, bert, deberta_v2, gemma3, gpt2, llama, mixture, modernbert, opt, phi3, roberta, t5, vit

architectures = Registry[Architecture]("architecture", "architectures")

for _file in (bart, bert, deberta_v2, gemma3, gpt2, llama, mixture, modernbert, opt, phi3, roberta, t5, vit):
    architectures.register(_file.__name__.rpartition(".")[2])(_file.ARCHITECTURE)


def known(model_type: str) -> Architecture | None:
    """The architecture that describes ``model_type``; None if no file does."""
    for name in architectures:
        if model_type in architectures[name].model_types:
            return architectures[name]
    return None
