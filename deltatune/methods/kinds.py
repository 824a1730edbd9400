"""The four ways a delta acts, as abstract patches, and what a method is.

A *method* is a frozen dataclass: its fields are its whole configuration. ``build`` turns it into *patches*, small
modules that hold the trainable tensors and the formula for one site. What a patch does to its site is told by its
abstract class here, never by its name, and the engine in ``injection`` runs one act per class:

| patch | act |
|---|---|
| ``OutputPatch`` | y <- F(x, y): edits what the module returns |
| ``InputPatch`` | x <- F(x): edits what the module is given |
| ``TokenPatch`` | y <- F(ranks, y): edits what a layer returns, at some of its tokens |
| ``BranchPatch`` | y <- F(x, y): edits what a sub-layer returns, with x what the sub-layer was given |
| ``BranchInputPatch`` | h <- F(x, h): the same for what its last module is given |
| ``WeightPatch`` | theta <- g(theta; phi): edits a parameter the module reads |
| ``SelectionPatch`` | lets a parameter of the backbone train in place |
| ``PrefixPatch`` | adds virtual keys and values to an attention |
| ``ConditionalPrefixPatch`` | adds virtual keys and values that depend on the attention's input |
| ``PromptPatch`` | adds virtual input embeddings to a text stack |
| ``SidePatch`` | y <- y + F(h_0, ..., h_L): adds to what a text stack returns, and only reads its hidden states |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from deltatune.registry import Registry
from deltatune.structure.site import Site

Kind = Literal["output", "weight", "context", "selection"]
Family = Literal["addition", "specification", "reparameterization", "baseline"]


class Patch(nn.Module, ABC):
    """What a method builds for one site; one of the classes below.

    Class attributes:
        unroutable: why its delta cannot be used by single rows of a batch; empty where it can.
    """

    unroutable: ClassVar[str] = ""


class OutputPatch(Patch):
    """y <- F(x, y) behind one module's forward."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Edit the output.

        Args:
            x: what the module was given, (..., in_features); token ids (...) for an embedding.
            y: what it returned, (..., out_features).

        Returns:
            The new output, of y's shape and dtype.
        """


class InputPatch(Patch):
    """x <- F(x) before one module's forward."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Edit the input x, (..., in_features), keeping its shape and dtype."""


class TokenPatch(OutputPatch):
    """y <- F(ranks, y) behind one transformer layer, where the ranks tell where each token stands among the real ones.

    ``forward`` is given in place of x the ranks (2, batch, seq): counted from the beginning of the row and from its end, 1
    the first, 0 at padding. Tokens in a key-value cache and the virtual ones of prompts count.
    """


class BranchPatch(OutputPatch):
    """y <- F(x, y) at the last projection of a sub-layer, where x is what the sub-layer's first one was given.

    So it runs beside the whole sub-layer: from the input of an attention's query to the output of its output
    projection, or from the input of ``feed_forward.up`` to the output of ``feed_forward.down``.
    """


class BranchInputPatch(Patch):
    """h <- F(x, h) ahead of the last projection of a sub-layer, where x is what the sub-layer's first one was given."""

    @abstractmethod
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Edit what the last projection is given.

        Args:
            x: what the sub-layer was given, (..., hidden).
            h: what its last projection is given, (..., in_features).

        Returns:
            The new h, of its shape and dtype.
        """


class WeightPatch(Patch):
    """theta <- g(theta; phi) for one parameter.

    Attributes:
        parameter: path of the parameter below the site's module.
    """

    parameter: str

    @abstractmethod
    def forward(self, theta: Tensor) -> Tensor:
        """The effective parameter, of theta's shape, dtype and device; theta itself is never written."""


class SelectionPatch(Patch):
    """Lets one parameter of the backbone train in place: theta' is the Parameter itself.

    Args:
        parameter: path of the parameter below the site's module.
        by_value: the backbone's own value is a random draw, as of a fresh task head, so that differences from it mean
            nothing: the last active delta's value stands, whatever the weights.
    """

    def __init__(self, parameter: str, by_value: bool = False) -> None:
        super().__init__()
        self.parameter = parameter
        self.by_value = by_value


class PrefixPatch(Patch):
    """K <- [P_k; K], V <- [P_v; V] in one attention module.

    Attributes:
        placed: the virtual keys take the positions ahead of the text; else they have none, and the text begins at position 0.
    """

    placed: bool = True

    @abstractmethod
    def forward(self) -> tuple[Tensor, Tensor]:
        """P_k and P_v, each (key_value_heads, num_virtual_tokens, head_dim)."""


class ConditionalPrefixPatch(Patch):
    """K <- [P_k(x); K], V <- [P_v(x); V] in one attention module whose input is x.

    Attributes:
        num_virtual_tokens: how many, whatever x is.
    """

    num_virtual_tokens: int

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """P_k and P_v of every row.

        Args:
            x: the hidden states the attention module was given (the queries' side of a cross-attention), (batch, seq, hidden);
                padding included, and with a key-value cache the new tokens only.

        Returns:
            Two tensors (batch, key_value_heads, num_virtual_tokens, head_dim).
        """


class PromptPatch(Patch):
    """X <- [P; X] at the embeddings of one text stack.

    Attributes:
        seen_by_decoder: of an encoder, the decoder attends to its outputs at the virtual tokens, too.
    """

    seen_by_decoder: bool = False

    @abstractmethod
    def forward(self) -> Tensor:
        """P, (num_virtual_tokens, hidden)."""


class SidePatch(Patch):
    """y <- y + F(h_0, ..., h_L) at the end of a text stack of L layers, with no backward through them.

    Attributes:
        num_layers: L.
    """

    num_layers: int

    @abstractmethod
    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """What is added.

        Args:
            states: what each layer was given and what the stack returns, detached, each (batch, seq, hidden); with a
                key-value cache the new tokens only.

        Returns:
            (batch, seq, hidden), of their dtype.
        """


@runtime_checkable
class Mergeable(Protocol):
    """An output or input patch on a linear map that can be folded into its weight."""

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """New weight (out, in) and bias (out,) such that the plain linear map equals the patched one."""


@runtime_checkable
class LowRank(Protocol):
    """An output patch on a linear map that is y + s (x A^T) B^T."""

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """A (r, in), B (out, r) and s, with gradients to what trains; None while it is more than that, as with dropout."""


@runtime_checkable
class Commuting(Protocol):
    """A patch that commutes with those of the same group: ``add`` (y + d(x), theta + d) or ``multiply`` (l * y)."""

    commutes: str


@runtime_checkable
class Stochastic(Protocol):
    """A patch that draws random numbers: once per parameter and forward of the backbone, so that every reader sees the same draw."""

    def draw(self) -> None:
        """Draw anew; called before each training forward of the backbone."""


@runtime_checkable
class Reaching(Protocol):
    """A weight patch whose g also depends on the delta's shared state; what is cached of it follows that, too."""

    @property
    def shared(self) -> nn.Module:
        """The shared state it reaches."""


@dataclass(frozen=True)
class Method(ABC):
    """A recipe for a delta: a frozen dataclass of fewer than eight fields.

    Class attributes:
        family: addition, specification or reparameterization, after Ding et al. 2023; ``baseline`` for the controls.
        sub_family: what the survey splits further, such as ``adapter-like`` and ``soft prompt``.
        kind: how it acts in the main; a single patch may act otherwise where a site needs it.
        where: default roles; an entry ending in ``?`` may be absent from a backbone.
        identity: a fresh delta leaves the outputs as they were.
        trains: something of a delta wants gradients; False for a control that is only scored.
        reads_weights: ``build`` reads the values of the backbone's parameters, not only their shapes; it sees the
            originals then, whatever acts or is merged.
        learning_rate: what ``dt.train`` uses when none is given.
        source: the paper, as an arXiv id or a citation.
    """

    family: ClassVar[Family]
    sub_family: ClassVar[str] = ""
    kind: ClassVar[Kind]
    where: ClassVar[tuple[str, ...]]
    identity: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = ""

    @abstractmethod
    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """The patches for one site: none where the site has nothing for this method (a norm without bias, for BitFit).

        Args:
            site: where they will sit; they read its shapes, never its model.
            shared: what ``share`` returned, for methods that declare it; a patch keeps no registered reference to it.

        Raises:
            Unsupported: the mathematics does not cover such a site.
        """


@runtime_checkable
class Spelled(Protocol):
    """A method that may be written in words; ``dt.train`` spells it before it attaches, a loop of your own calls ``spell`` itself."""

    def spell(self, tokenizer: Any, labels: Sequence[str]) -> Method:
        """The same recipe with token ids in place of words, which needs no tokenizer from then on; itself where it has none left.

        Args:
            tokenizer: the backbone's, as of transformers.
            labels: the words of the task's labels; none where it has no labels.

        Raises:
            InvalidValue: a word that is no token, or no labels where the recipe needs them.
        """


@runtime_checkable
class Surveying(Protocol):
    """A method that checks its fields against all its sites together, before anything is built."""

    def survey(self, sites: Sequence[Site]) -> None:
        """Raise where the sites do not suit the fields."""


@runtime_checkable
class Sharing(Protocol):
    """A method with state common to all its sites."""

    def share(self, sites: Sequence[Site]) -> nn.Module | None:
        """The shared state, registered once in the delta; None where the fields ask for none."""


@runtime_checkable
class Prepared(Protocol):
    """A method that looks at data before the first step."""

    def prepare(self, patches: Mapping[str, Patch], backbone: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
        """Initialise the patches (key of the site -> patch) from batches that hold labels."""


@runtime_checkable
class Penalised(Protocol):
    """A method with a term of its own in the loss."""

    def penalty(self, patches: Sequence[Patch]) -> Tensor:
        """The term, a scalar; added to the task's loss once per optimiser step."""


@runtime_checkable
class Stepping(Protocol):
    """A method that acts between optimiser steps."""

    def after_step(self, patches: Sequence[Patch], step: int, total: int) -> None:
        """Called after optimiser step ``step`` (1-based) of ``total``."""


@runtime_checkable
class Grouped(Protocol):
    """A method with learning rates of its own for some parameters."""

    def parameter_groups(self, parameters: Mapping[str, nn.Parameter], lr: float) -> list[dict[str, Any]]:
        """Optimiser groups over the trainable parameters (name -> parameter)."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training: its name and its share of all steps."""

    name: str
    share: float


@runtime_checkable
class Phased(Protocol):
    """A method that trains in phases."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases in order; their shares add up to 1."""

    def enter(self, patches: Sequence[Patch], phase: str) -> None:
        """Called once when a phase begins."""


@runtime_checkable
class Exported(Protocol):
    """A method whose training-time parameters shrink afterwards."""

    def export(self, patches: Sequence[Patch], shared: nn.Module | None) -> None:
        """Replace the training-time form by the final one, outputs unchanged."""

    def is_exported(self, patches: Sequence[Patch]) -> bool:
        """True once ``export`` has run."""


@runtime_checkable
class Reforming(Protocol):
    """A patch (or shared module) with more than one form: while training, pruned, exported."""

    def reform(self, state: Mapping[str, Tensor]) -> None:
        """Take the form whose ``state_dict`` has these names and shapes; called before the tensors are loaded."""


methods: Registry[type[Method]] = Registry("method", "methods", "deltatune.methods.builtin")
"""Every method by its name on the command line and in delta files."""
