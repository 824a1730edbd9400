"""The command line, in this process where that shows the same."""
