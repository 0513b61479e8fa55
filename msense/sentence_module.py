"""Alias of the class that `modules.json` of older students names."""

from msense.student.sentence_transformer import SenseModule

__all__ = ["SenseModule"]
