"""The total number of senses of a dictionary, as an average per token or a size in bytes."""

import math
import re
from dataclasses import dataclass

from msense.errors import InputError


@dataclass(frozen=True)
class SenseBudget:
    """How many senses all tokens share: on average, or the bytes of all senses in a dictionary.

    Raises:
        InputError: it is neither an average from 1 on nor a size.
    """

    average: float = 0.0
    size: int = 0

    def __post_init__(self) -> None:
        if not ((1 <= self.average < math.inf and self.size == 0) or (self.size > 0 and self.average == 0)):
            raise InputError("must be an average from 1 on, as every token needs a sense, or a size above 0")

    @classmethod
    def parse(cls, text: str) -> "SenseBudget":
        """Read `10`, `2.5`, `60MB` or `2GB`; InputError for anything else."""
        found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(?:([kMGT]?)B)?", text.strip(), re.ASCII)
        if not found:
            raise InputError("must be an average number of senses, such as 10, or a size, such as 60MB")
        amount = float(found[1])
        if text.strip().endswith("B"):
            return cls(size=int(amount * 1000 ** " kMGT".index(found[2] or " ")))
        return cls(average=amount)

    def senses(self, tokens: int, dim: int, value_bytes: int = 2) -> int:
        """Return the senses in all for so many tokens; of a size as many as it has room for, be they too few."""
        return int(self.average * tokens) if self.average else self.size // sense_bytes(dim, value_bytes)


DEFAULT_BUDGET = SenseBudget(average=5.0)


def sense_bytes(dim: int, value_bytes: int = 2) -> int:
    """Return the bytes that a sense takes in a dictionary: its centroid of D values, count and spread."""
    return value_bytes * dim + 12
