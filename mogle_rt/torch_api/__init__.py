"""PyTorch itself: the settings that a computation runs under, and the private functions that are used."""
