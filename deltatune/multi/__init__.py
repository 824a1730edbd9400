"""Many deltas over one backbone: each row of a batch uses its own."""
