"""The oracle table: what a case is, and how it is checked.

To add a method, write ``<method>.py`` beside this file with ``ORACLE = Oracle(...)`` (PEFT's config and its names of tensors, a formula)
and ``CASES = cases(...)`` over ``HOSTS`` and settings; ``test_oracles.py`` finds both. Raise its ``AT_LEAST`` by their number. Where PEFT
does not decide, a ``Wrong`` says why and what PEFT's failure is.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.injection.attach import attach
from deltatune.injection.delta import Delta
from deltatune.methods import Method
from deltatune.structure.site import Site
from tests.methods.oracles.hosts import HOSTS, Host
from tests.models import output

if TYPE_CHECKING:
    from deltatune.injection.entries import Entry

Formula = Callable[[Tensor, Mapping[str, Tensor], Site, Method], Tensor]
"""(theta as stored, our tensors of its patch, the site, the method) -> the effective theta."""


def reshaped(name: str, own: Tensor, theirs: Tensor) -> Tensor:
    """PEFT's tensor (or gradient) in the shape of ours."""
    return theirs.reshape(own.shape)


def nothing(delta: Delta, theirs: nn.Module) -> None:
    """There is no frozen state to copy."""


@dataclass(frozen=True)
class Oracle:
    """How one method of ours and PEFT's are the same.

    Attributes:
        method: our method, given a case's settings.
        config: PEFT's config, given the settings and ``target_modules`` (and ``target_parameters``, where the host has any).
        names: our tensor's name in its patch, and the site -> PEFT's name for it below the layer: ``lora_A.default.weight``.
        shaped: PEFT's tensor as ours; by default it only has another shape.
        settle: copies what is frozen, such as random bases, from PEFT's model into our delta.
        formula: the explicit formula, which decides where PEFT is wrong.
    """

    method: Callable[..., Method]
    config: Callable[..., Any]
    names: Callable[[str, Site], str]
    formula: Formula | None = None
    shaped: Callable[[str, Tensor, Tensor], Tensor] = reshaped
    settle: Callable[[Delta, nn.Module], None] = nothing


class OtherTensors(AssertionError):
    """PEFT trains other tensors than we do, or tensors of other sizes."""


class OtherNumbers(AssertionError):
    """PEFT's outputs or gradients are not ours."""


@dataclass(frozen=True)
class Wrong:
    """Why PEFT does not decide, and how that shows: nothing else that goes wrong counts for it.

    Attributes:
        reason: in words.
        failure: what the comparison must raise; ``TypeError``, ``ValueError`` or ``NotImplementedError`` where PEFT refuses.
    """

    reason: str
    failure: type[Exception] | tuple[type[Exception], ...] = OtherNumbers


@dataclass(frozen=True)
class Case:
    """One method with some settings on one host.

    Attributes:
        wrong: why PEFT does not decide here; the formula does then, and PEFT must fail the comparison as it says.
    """

    method: str
    host: Host
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    wrong: Wrong | None = None

    def __str__(self) -> str:
        return "-".join([self.method, self.host.name, *(f"{name}={value}" for name, value in self.settings.items())])


def cases(method: str, hosts: Iterable[str], settings: Sequence[Mapping[str, Any]], wrong: Mapping[str, Wrong] | None = None) -> list[Case]:
    """Every host with every settings; ``wrong``: host -> why PEFT does not decide there."""
    return [Case(method, HOSTS[host], setting, (wrong or {}).get(host)) for host, setting in product(hosts, settings)]


def check(case: Case, oracle: Oracle) -> None:
    """PEFT's random tensors in a delta of ours: outputs and gradients agree to 1e-5, with PEFT or with the formula."""
    backbone, inputs = case.host.build()
    if case.wrong is None:
        _compare_with_peft(case, oracle, backbone, inputs)
        return
    _compare_with_formula(case, oracle, backbone, inputs)
    try:
        _compare_with_peft(case, oracle, *case.host.build())
    except case.wrong.failure:
        return
    raise AssertionError(f"PEFT is right about {case} now: take the exception out ({case.wrong.reason}).")


def _compare_with_peft(case: Case, oracle: Oracle, backbone: nn.Module, inputs: dict[str, Tensor]) -> None:
    theirs = _peft(case, oracle, backbone)
    delta = attach(backbone, oracle.method(**case.settings), case.host.where, head=False)
    tensors = dict(theirs.base_model.model.named_parameters())
    pairs = {}
    for entry in delta.entries:
        layer = case.host.renamed.get(entry.site.path, entry.site.path)
        for name, own in _trained(entry).items():
            pairs[f"{entry.key}.{name}"] = name, own, tensors[f"{layer}.{oracle.names(name, entry.site)}"]
    trained = {id(parameter) for parameter in theirs.parameters() if parameter.requires_grad}
    sizes = [sum(own.numel() for _, own, _ in pairs.values()), sum(other.numel() for _, _, other in pairs.values())]
    if {id(other) for _, _, other in pairs.values()} != trained or sizes[0] != sizes[1]:
        raise OtherTensors(f"{len(pairs)} tensors of {sizes[0]} numbers, PEFT's {len(trained)} of {sizes[1]}.")
    with torch.no_grad():
        oracle.settle(delta, theirs)
        for name, own, other in pairs.values():
            own.copy_(oracle.shaped(name, own, other))
    found, expected = output(backbone, inputs), output(theirs, inputs)
    _assert_acts(delta, backbone, inputs, expected)
    _assert_same(found, expected, "output")
    found.square().mean().backward()
    expected.square().mean().backward()
    for key, (name, own, other) in pairs.items():
        assert own.grad is not None and other.grad is not None, key
        _assert_same(own.grad, oracle.shaped(name, own, other.grad), f"gradient of {key}")


def _compare_with_formula(case: Case, oracle: Oracle, backbone: nn.Module, inputs: dict[str, Tensor]) -> None:
    assert oracle.formula is not None, f"{case}: an exception needs a formula"
    plain = copy.deepcopy(backbone)
    torch.manual_seed(0)
    method = oracle.method(**case.settings)
    delta = attach(backbone, method, case.host.where, head=False)
    with torch.no_grad():
        for parameter in delta.trained_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    own, copies, thetas = [], [], {}
    for entry in delta.entries:
        path = entry.site.path if entry.site.parameter else f"{entry.site.path}.weight"
        tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in _trained(entry).items()}
        thetas[path] = oracle.formula(plain.get_parameter(path).detach(), tensors, entry.site, method)
        own += _trained(entry).values()
        copies += tensors.values()
    found = output(backbone, inputs)
    expected = torch.func.functional_call(plain, thetas, (), dict(inputs))
    _assert_acts(delta, backbone, inputs, expected)
    _assert_same(found, expected, "output")
    gradients = torch.autograd.grad(found.square().mean(), own), torch.autograd.grad(expected.square().mean(), copies)
    for ours, by_hand in zip(*gradients, strict=True):
        _assert_same(ours, by_hand, "gradient")


def _assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    try:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    except AssertionError as error:
        raise OtherNumbers(f"{what}: {error}") from error


def _peft(case: Case, oracle: Oracle, backbone: nn.Module) -> Any:
    """PEFT's model with every trained tensor moved away from its start."""
    from peft import get_peft_model

    torch.manual_seed(0)
    targets: dict[str, Any] = {"target_modules": list(case.host.targets)}
    if case.host.parameters:
        targets["target_parameters"] = list(case.host.parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers by names that are going away, and warns of Conv1D
        model: Any = get_peft_model(copy.deepcopy(backbone), oracle.config(**targets, **case.settings))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def _trained(entry: Entry) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in entry.patch.named_parameters() if entry.flags[name]}


@torch.no_grad()
def _assert_acts(delta: Delta, backbone: nn.Module, inputs: dict[str, Tensor], expected: Tensor) -> None:
    delta.disable()
    plain = output(backbone, inputs)
    delta.enable()
    assert (expected - plain).abs().max() > 1e-4, "the oracle does something"
