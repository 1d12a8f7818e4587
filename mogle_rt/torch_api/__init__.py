"""PyTorch itself: the settings that a computation runs under, and what it offers without promising it."""
