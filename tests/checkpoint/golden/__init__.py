"""Delta files of past format versions, which load for ever."""
