"""Clustering of token embeddings on arrays in memory: k-means, Markov clustering and the allocation of senses."""
