"""Methods that add modules or positions (the survey's addition-based family)."""
