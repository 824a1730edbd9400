"""Methods that choose existing parameters (the survey's specification-based family), and the baselines."""
