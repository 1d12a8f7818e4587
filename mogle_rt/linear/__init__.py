"""Linear layers: the formats of a weight matrix, low-rank branches beside it, and the products of both."""
