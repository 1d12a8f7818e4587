"""The weights as modules: transformer, mixture of experts, modulation."""
