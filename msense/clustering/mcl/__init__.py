"""Markov clustering, and the paper's rule for the number of senses of a token of a decoder teacher."""

from msense.mcl.clusters import markov_clusters
from msense.mcl.config import MclConfig
from msense.mcl.flow import Cluster
from msense.mcl.senses import MCL_POINTS, mcl_senses

__all__ = ["MCL_POINTS", "Cluster", "MclConfig", "markov_clusters", "mcl_senses"]
