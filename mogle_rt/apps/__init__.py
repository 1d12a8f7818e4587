"""The command line ``mogle-rt``, and the files that it writes."""
