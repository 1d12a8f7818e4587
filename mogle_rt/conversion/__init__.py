"""Read the files that others publish, and convert them into a bundle."""
