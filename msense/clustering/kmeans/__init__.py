"""k-means per token on arrays in memory: small tokens in batches, large ones in blocks that workers may share."""

from msense.clustering.kmeans.batches import Clusters, cluster_tokens
from msense.clustering.kmeans.seeding import BLOCK_ROWS, SEED_POINTS, KMeansConfig

__all__ = ["BLOCK_ROWS", "SEED_POINTS", "Clusters", "KMeansConfig", "cluster_tokens"]
