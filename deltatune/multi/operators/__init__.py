"""How many lanes are applied to many rows at once: operators with one interface, chosen by shape."""
