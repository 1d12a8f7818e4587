"""What a job takes, counted without weights."""
