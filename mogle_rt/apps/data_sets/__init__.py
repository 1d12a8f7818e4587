"""Commands for whole data sets."""
