"""A weight seen as one matrix, or as a stack of them: the form in which papers write their changes of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltatune.structure.site import Site, is_packed


@dataclass(frozen=True)
class MatrixView:
    """How a parameter reads as (out, in), whatever it is stored as.

    A linear map is (out, in) as it stands and ``Conv1D`` is stored (in, out); a convolution (out, in, *kernel) is
    (out, in * kernel), an embedding (rows, width), and raw experts are a stack (experts, out, in).

    Attributes:
        parameter: path of the parameter below the site's module.
        stack: () or (experts,).
        rows: out.
        columns: in, times the size of the kernel.
        kernel: size of the kernel; 1 for what is no convolution.
        transposed: the parameter is stored (..., in, out).
    """

    parameter: str
    stack: tuple[int, ...]
    rows: int
    columns: int
    kernel: int
    transposed: bool

    @classmethod
    def of(cls, site: Site) -> MatrixView:
        """The view of the site's weight, or of the rows of it that belong to the role."""
        if site.parameter is None and site.is_linear and is_packed(site.weight):  # its shape says nothing then
            return cls("weight", (), site.out_features, site.in_features, 1, site.transposed)
        theta = site.part(site.weight)
        stacked = site.parameter is not None and theta.ndim == 3
        stack, matrix = (tuple(theta.shape[:1]), theta.shape[1:]) if stacked else ((), theta.shape)
        rows, columns, kernel = matrix[0], matrix[1:].numel(), matrix[2:].numel()
        if site.transposed:
            rows, columns = columns, rows
        return cls(site.parameter or "weight", stack, rows, columns, kernel, site.transposed)

    @property
    def is_plain(self) -> bool:
        """It is one matrix (out, in), however it is stored, and no convolution."""
        return not self.stack and self.kernel == 1

    def read(self, theta: Tensor) -> Tensor:
        """theta as (*stack, out, in)."""
        matrix = theta.mT if self.transposed else theta
        return matrix.reshape(*self.stack, self.rows, self.columns)

    def write(self, matrix: Tensor, theta: Tensor) -> Tensor:
        """A matrix (*stack, out, in) in the shape and type of theta."""
        stored = matrix.mT if self.transposed else matrix
        return stored.reshape(theta.shape).to(theta.dtype)


def acts_on_outputs(site: Site) -> bool:
    """The site is one linear map that is called as such and owns its weight, so that a change of W can run on x and y."""
    return site.parameter is None and not site.tied and site.is_linear


def kaiming(*shape: int) -> nn.Parameter:
    """A matrix, or a stack of them, with entries from U(-1, 1) / sqrt(columns), as ``nn.Linear`` starts."""
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1) / shape[-1] ** 0.5)
