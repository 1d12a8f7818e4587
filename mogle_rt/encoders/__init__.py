"""The encoders: they turn mask pictures and prompts into tensors."""
