"""Markov clustering, and the paper's rule for the number of senses of a token of a decoder teacher."""

from msense.clustering.mcl.clusters import markov_clusters
from msense.clustering.mcl.config import MclConfig
from msense.clustering.mcl.flow import Cluster
from msense.clustering.mcl.senses import MCL_POINTS, mcl_senses

__all__ = ["MCL_POINTS", "Cluster", "MclConfig", "markov_clusters", "mcl_senses"]
