"""Markov clustering, and the paper's rule for the number of senses of a token of a decoder teacher."""

from msense.clustering.mcl.clusters import MCL_POINTS, markov_clusters, mcl_senses
from msense.clustering.mcl.flow import Cluster, MclConfig

__all__ = ["MCL_POINTS", "Cluster", "MclConfig", "markov_clusters", "mcl_senses"]
