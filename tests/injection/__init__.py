"""The kernel by itself: slots, acts, ledger, merge and composition on plain modules."""
