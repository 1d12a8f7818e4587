"""A step's operations: their contract, their implementations and the choice between them."""
