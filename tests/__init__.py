"""Tests of deltatune; the folders mirror the package."""
