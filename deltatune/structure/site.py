"""A site: one named place of a backbone where a patch can sit."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported

DELTA_CHILD = "deltatune"
"""Name of the children in which slots and the ledger live; they are no part of the backbone."""

Rows = slice | Tensor
"""Index set of the output rows a fused projection gives one role: contiguous, or interleaved per head."""


@dataclass(frozen=True)
class LayerList:
    """A list of transformer layers.

    Attributes:
        path: its path in the backbone.
        depth: number of its layers.
        size: number of parameters in all of them, each counted once.
        side: ``encoder`` or ``decoder`` where the backbone has both, else empty.
    """

    path: str
    depth: int
    size: int
    side: str = ""


@dataclass(frozen=True)
class Site:
    """A named place in the backbone.

    Attributes:
        path: dotted path in the backbone; of the parameter for a raw-parameter site.
        module: the module that hosts the patch. It is called in every forward that uses the site.
        role: architecture-independent name such as ``attention.query`` or ``decoder.feed_forward.up``; None if unknown.
        layer: index of the transformer layer, counted within its stack; None outside the layers.
        rows: output rows of a fused projection that belong to the role; None for all rows.
        parameter: path, below ``module``, of a parameter that is read without calling its owner; None otherwise.
        tied: the site's weight is shared with another module, so only its weight can be changed, for all owners.
        reached: False if PyTorch never calls the module (it reads the parameters directly, or it is a container).
        routable: False if the rows of its input are not a multiple of the batch (DeBERTa's shared projections).
        layer_list: the list of layers it lies in; None outside the layers.
        heads: number of query heads of the attention it is a projection of; None elsewhere, and where the attention does not tell.
    """

    path: str
    module: nn.Module = field(repr=False, compare=False)
    role: str | None = None
    layer: int | None = None
    rows: Rows | None = field(default=None, repr=False, compare=False)
    parameter: str | None = None
    tied: bool = False
    reached: bool = True
    routable: bool = True
    layer_list: LayerList | None = field(default=None, repr=False, compare=False)
    heads: int | None = field(default=None, repr=False, compare=False)

    @property
    def leaf(self) -> str:
        """Last word of the role: ``query``; it tells apart the roles of one fused projection."""
        return (self.role or "").rpartition(".")[2]

    @property
    def key(self) -> str:
        """Stable name of the site in delta files: the path, with ``:query`` behind it where a projection is fused."""
        return self.path if self.rows is None else f"{self.path}:{self.leaf}"

    @property
    def module_path(self) -> str:
        """Path of ``module``."""
        return self.path if self.parameter is None else self.path.removesuffix(self.parameter).rstrip(".")

    @property
    def transposed(self) -> bool:
        """True where the weight is stored (in, out), as in transformers' ``Conv1D`` and some experts."""
        return hasattr(self.module, "nf") if self.parameter is None else getattr(self.module, "is_transposed", False) is True

    @property
    def weight(self) -> Tensor:
        """The site's weight as it stands now (a Parameter, or a quantised tensor)."""
        if self.parameter is not None:
            owner, _, name = self.parameter.rpartition(".")
            parameter: Tensor = getattr(self.module.get_submodule(owner), name)
            return parameter
        weight = getattr(self.module, "weight", None)
        if not isinstance(weight, Tensor):
            raise Unsupported(
                f"`{self.path}` ({type(self.module).__name__}) has no weight of its own. Choose a site inside it; `find_sites` lists them."
            )
        return weight

    @property
    def parameters(self) -> tuple[str, ...]:
        """Paths, below ``module``, of the parameters the site stands for: its one raw parameter, or the module's own."""
        if self.parameter is not None:
            return (self.parameter,)
        return tuple(name for name, tensor in self.module._parameters.items() if tensor is not None)

    @property
    def all_parameters(self) -> tuple[str, ...]:
        """Paths, below ``module``, of every parameter of the backbone at the site, at whatever depth; a tied one has its first."""
        if self.parameter is not None:
            return (self.parameter,)
        paths: dict[int, str] = {}
        for path, module in modules_of(self.module).items():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    paths.setdefault(id(tensor), f"{path}.{name}" if path else name)
        return tuple(paths.values())

    @property
    def is_linear(self) -> bool:
        """The module is one linear map on the last axis: (..., in_features) -> (..., out_features)."""
        widths = (("in_features", "out_features"), ("nx", "nf"))
        return any(isinstance(getattr(self.module, a, None), int) and isinstance(getattr(self.module, b, None), int) for a, b in widths)

    @property
    def is_norm(self) -> bool:
        """The module normalises over its last axis, and is linear in a gain (width,) called ``weight``."""
        weight = self.module._parameters.get("weight")
        if weight is None or weight.ndim != 1 or isinstance(self.module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
            return False
        return isinstance(self.module, nn.LayerNorm | nn.RMSNorm) or type(self.module).__name__.endswith("Norm")

    @property
    def is_expert(self) -> bool:
        """A router chooses what gets there: rows are no longer in the batch's order, and a forward may pass it by."""
        return "experts" in (self.role or "").split(".")

    @property
    def has_matrix(self) -> bool:
        """The site has a weight of at least two axes: a linear map, a convolution, an embedding, raw experts."""
        tensor = self.weight if self.parameter is not None else getattr(self.module, "weight", None)
        return self.is_linear or (isinstance(tensor, Tensor) and tensor.ndim >= 2)

    def part(self, theta: Tensor) -> Tensor:
        """The rows of ``theta`` that belong to the role; all of it where the site has no rows."""
        return self.rows_of(theta, self.rows_axis(theta))

    def rows_of(self, tensor: Tensor, axis: int) -> Tensor:
        """The role's rows along one axis; all of them where the site has no rows."""
        if self.rows is None:
            return tensor
        if isinstance(self.rows, Tensor):
            return tensor.index_select(axis, self.rows.to(tensor.device))
        return tensor.narrow(axis, self.rows.start, self.rows.stop - self.rows.start)

    @property
    def channel_axis(self) -> int:
        """Axis of the module's output that holds the channels: 1 behind a batch axis for convolutions, else the last."""
        kinds = {(nn.Conv1d, nn.ConvTranspose1d): -2, (nn.Conv2d, nn.ConvTranspose2d): -3, (nn.Conv3d, nn.ConvTranspose3d): -4}
        return next((axis for convolutions, axis in kinds.items() if isinstance(self.module, convolutions)), -1)

    def rows_axis(self, theta: Tensor) -> int:
        """Axis of the parameter ``theta`` that ``rows`` indexes: (out,), (out, in), (experts, out, in), or (in, out)."""
        return -1 if theta.ndim == 1 or self.transposed else -2

    @property
    def device(self) -> torch.device:
        """Where a patch for this site lives: beside the site's tensors, or where accelerate will bring offloaded ones."""
        for module in self.module.modules():  # offloading hooks the modules that own parameters, not those around them
            execution = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if execution is not None:
                return torch.device(execution)
            for tensor in module._parameters.values():
                if tensor is not None:
                    return tensor.device
        return torch.device("cpu")

    @property
    def in_features(self) -> int:
        """Width of the input x: (..., in_features); its channels for a convolution.

        Raises:
            Unsupported: the module has no linear-like input width.
        """
        return self._width("in_features", "nx", "embed_dim", "in_channels", transposed_axis=0, axis=-1)

    @property
    def out_features(self) -> int:
        """Width of the output y, or of its part that belongs to the role: (..., out_features); channels for a convolution.

        Raises:
            Unsupported: the module has no linear-like output width.
        """
        if self.rows is not None:
            return len(self.rows) if isinstance(self.rows, Tensor) else self.rows.stop - self.rows.start
        return self._width("out_features", "nf", "embed_dim", "out_channels", transposed_axis=-1, axis=0)

    def _width(self, *attributes: str, transposed_axis: int, axis: int) -> int:
        if self.parameter is None:
            for attribute in attributes:  # quantised layers pack their weight, so its shape is the last resort
                value = getattr(self.module, attribute, None)
                if isinstance(value, int):
                    return value
        shape = self.weight.shape
        if self.parameter is None and len(shape) > 2:
            kind = type(self.module).__name__
            raise Unsupported(f"`{self.path}` ({kind}) has a weight of shape {tuple(shape)} and is no linear map. Choose a linear site.")
        if isinstance(self.module, nn.Embedding) and self.parameter is None:
            return shape[1] if axis == 0 else shape[0]
        if len(shape) < 2:
            return shape[0]
        matrix = shape[-2:]  # experts stack theirs: (expert, out, in)
        return matrix[transposed_axis] if self.transposed else matrix[axis]


def is_packed(theta: Tensor) -> bool:
    """Whether a parameter is quantised: integers, or a tensor of a quantiser's own class."""
    return not theta.is_floating_point() or type(theta.data) is not Tensor


def size_of(theta: Tensor) -> int:
    """How many numbers a parameter stands for; one that is quantised to four bits holds two in a byte.

    >>> size_of(torch.zeros(2, 3))
    6
    """
    packed = getattr(theta, "quant_state", None)  # bitsandbytes
    return theta.numel() if packed is None else int(packed.shape.numel())


def modules_of(backbone: nn.Module) -> dict[str, nn.Module]:
    """Path -> module in module order, each module once, without what deltas put there.

    A leaf that stands in several places goes by the last one: T5's `shared`, which is never called as such, may be the
    same object as the stacks' embeddings.
    """
    found: dict[str, nn.Module] = {}
    paths: dict[int, str] = {}

    def walk(module: nn.Module, path: str) -> None:
        if id(module) in paths:
            if module._modules:
                return
            del found[paths[id(module)]]
        paths[id(module)] = path
        found[path] = module
        for name, child in module._modules.items():
            if child is not None and name != DELTA_CHILD:
                walk(child, f"{path}.{name}" if path else name)

    walk(backbone, "")
    return found
