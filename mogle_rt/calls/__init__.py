"""One call of a pipeline: what it reports, its stages, and the steps between a mask or prompt and the loop."""
