"""Ways to use the runtime: the command line and what it writes."""
