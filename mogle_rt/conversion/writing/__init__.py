"""Writing a bundle: tensor by tensor, plainly or in a weight format."""
