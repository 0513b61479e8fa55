"""Markov clustering: the clusters of graphs, and how many senses a token gets by the rule of the paper for decoders."""

from msense.mcl.clusters import markov_clusters
from msense.mcl.config import MclConfig
from msense.mcl.flow import Cluster
from msense.mcl.senses import MCL_POINTS, mcl_senses

__all__ = ["MCL_POINTS", "Cluster", "MclConfig", "markov_clusters", "mcl_senses"]
