"""Other people's files, made into a bundle."""
