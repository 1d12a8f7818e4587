"""What fast modes cost on a model: every way beside exact images and beside fewer steps, and the settings to take."""
