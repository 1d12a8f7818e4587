"""One weight matrix, and how its product is made."""
