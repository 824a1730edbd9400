"""Tests of the anatomy of backbones."""
