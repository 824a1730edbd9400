"""The backbone's own weight as a matrix, for methods that start from its values."""

from __future__ import annotations

from torch import Tensor

from deltatune.errors import Unsupported
from deltatune.methods.kinds import Method
from deltatune.structure.site import Site, is_packed


def original(site: Site, method: Method) -> Tensor:
    """The site's weight, or the rows of it that belong to the role, as stored.

    Raises:
        Unsupported: it is quantised, or not in memory.
    """
    weight = site.weight
    away = weight.is_meta and site.device.type != "meta"
    if away or (not weight.is_meta and is_packed(weight)):
        state = "offloaded" if away else f"quantised ({type(weight.data).__name__}, {weight.dtype})"
        raise Unsupported(
            f"{type(method).__name__} starts from the values of the weight at `{site.key}`, which is {state}. "
            "Load the backbone unquantised and in memory, or use LoRA."
        )
    return site.part(weight.detach())
