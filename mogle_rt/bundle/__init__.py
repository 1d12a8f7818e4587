"""The single file that holds a model: its schema, its container, how it is written and opened."""
