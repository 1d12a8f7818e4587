"""Pictures and prompts, made into tensors."""
