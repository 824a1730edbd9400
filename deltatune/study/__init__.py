"""Studies: grids of trials that survive any kill, their statistics, and reports that judge claims."""
