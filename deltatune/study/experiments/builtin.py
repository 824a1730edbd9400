"""The experiments that come with the package: importing this enters them."""

from __future__ import annotations

from deltatune.study.experiments import performance as performance
