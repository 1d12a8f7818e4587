"""One weight matrix, and how its product is made: weight formats, low-rank branches beside them, layers of both."""
