"""Fast modes: what a run leaves out on request, and what each of its steps then does."""
