"""What clients ask for: read within limits, checked, and made into the inputs of the pipeline."""
