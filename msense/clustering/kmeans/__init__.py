"""k-means per token on arrays in memory: small tokens in batches, large ones in blocks that workers may share."""

from msense.clustering.kmeans.batches import Clusters, cluster_tokens
from msense.clustering.kmeans.curve import CURVE_POINTS, GRID, POINTS_PER_SENSE, variance_curves
from msense.clustering.kmeans.seeding import BLOCK_ROWS, SEED_POINTS, KMeansConfig

__all__ = ["BLOCK_ROWS", "CURVE_POINTS", "GRID", "POINTS_PER_SENSE", "SEED_POINTS"]
__all__ += ["Clusters", "KMeansConfig", "cluster_tokens", "variance_curves"]
