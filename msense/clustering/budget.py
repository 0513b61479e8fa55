"""The total number of senses of a dictionary, as an average per token or a size in bytes."""

import math
import re
from dataclasses import dataclass

from msense.errors import InputError


@dataclass(frozen=True)
class SenseBudget:
    """Total number of senses: an average per token, or the bytes of all senses in a dictionary.

    Raises:
        InputError: it is neither an average of at least 1 nor a size.
    """

    average: float = 0.0
    size: int = 0

    def __post_init__(self) -> None:
        if not ((1 <= self.average < math.inf and self.size == 0) or (self.size > 0 and self.average == 0)):
            raise InputError("must be an average of at least 1, as every token needs a sense, or a size above 0")

    @classmethod
    def parse(cls, text: str) -> "SenseBudget":
        """Parse `10`, `2.5`, `60MB` or `2GB`; raise InputError for anything else."""
        match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(?:([kMGT]?)(B))?", text.strip(), re.ASCII)
        if not match:
            raise InputError("must be an average number of senses, such as 10, or a size, such as 60MB")
        amount = float(match[1])
        return cls(size=int(amount * 1000 ** " kMGT".index(match[2] or " "))) if match[3] else cls(average=amount)

    def senses(self, tokens: int, dim: int, value_bytes: int = 2) -> int:
        """Return the total number of senses of this many tokens; a size may allow fewer than one per token."""
        return int(self.average * tokens) if self.average else self.size // sense_bytes(dim, value_bytes)


DEFAULT_BUDGET = SenseBudget(average=5.0)


def sense_bytes(dim: int, value_bytes: int = 2) -> int:
    """Return the bytes of a sense in a dictionary: its centroid of D values, count and RMS distance."""
    return value_bytes * dim + 12
