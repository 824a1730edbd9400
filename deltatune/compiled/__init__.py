"""Loops in C++ for what torch's own operations do slowly on a CPU; used where they were compiled, and never needed."""
