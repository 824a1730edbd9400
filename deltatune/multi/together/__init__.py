"""Fused training: many jobs, each with its own delta, share one backbone's forward and backward; begin with ``together``."""
