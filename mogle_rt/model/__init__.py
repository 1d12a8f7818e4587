"""The weights as modules."""
