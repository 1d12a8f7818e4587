"""The choice of device, dtype, weight format and threads for a machine."""
