"""Models that judge images: what they see becomes labels, features, embeddings or a score."""
