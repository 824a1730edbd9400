"""Tests of ``deltatune.training``."""
