"""How good images are, and what an approximation costs: measures, the models that judge, and a report of a data set."""
