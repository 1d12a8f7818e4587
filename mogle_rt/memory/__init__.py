"""What fits where: devices, budgets."""
