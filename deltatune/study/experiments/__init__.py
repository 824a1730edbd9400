"""The experiments, one file each: designs, claims, and what their reports show."""

from __future__ import annotations

from deltatune.study.experiments.experiment import experiments as experiments
