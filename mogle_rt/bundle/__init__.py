"""The bundle, a single file that holds a model: its schema, its container, and how it is opened."""
