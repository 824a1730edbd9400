"""Every case of the oracle table: the same weights in PEFT's model and in ours give the same outputs and gradients."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import tests.methods.oracles as package
from deltatune.methods import methods
from tests.methods.oracles.hosts import HOSTS
from tests.methods.oracles.table import Case, Oracle, check

AT_LEAST = 484
"""How many cases the table had when it was last added to."""

MODULES = [importlib.import_module(f"{package.__name__}.{found.name}") for found in pkgutil.iter_modules(package.__path__)]
PAGES = [module for module in MODULES if hasattr(module, "CASES")]
ORACLES: dict[str, Oracle] = {method: page.ORACLE for page in PAGES for method in {case.method for case in page.CASES}}
CASES: list[Case] = [case for page in PAGES for case in page.CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_case(case: Case) -> None:
    check(case, ORACLES[case.method])


def test_the_table_is_whole() -> None:
    assert len(CASES) >= AT_LEAST
    assert len({str(case) for case in CASES}) == len(CASES)
    assert {case.method for case in CASES} <= set(methods)
    assert {case.host.name for case in CASES} == set(HOSTS)
    assert all(case.wrong or oracle_decides(case) for case in CASES)


def oracle_decides(case: Case) -> bool:
    """PEFT is the oracle of at least two thirds of a method's cases, or its page would be empty talk."""
    own = [other for other in CASES if other.method == case.method]
    return sum(not other.wrong for other in own) * 3 >= 2 * len(own)
