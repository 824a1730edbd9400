"""The anatomy of a backbone: its sites, their roles, and how to name them."""
