"""PEFT as the oracle of every method it has, over every kind of module: a table of cases."""
