"""Weights in eight and four bits: how they are made, held and multiplied."""
