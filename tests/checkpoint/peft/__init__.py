"""PEFT's format: every type on three architectures, PEFT itself being the oracle."""
