"""Runners carry trials out: in the driver's own process, or on Ray. They write nothing into the store."""
