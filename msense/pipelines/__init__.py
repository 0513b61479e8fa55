"""Whole jobs: each reads as a list of stages."""
