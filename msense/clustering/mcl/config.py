"""Settings and constants of Markov clustering and of the rule that derives K from it."""

from dataclasses import dataclass

from msense.errors import InputError

# defaults of the package `markov-clustering`, which the paper keeps
LOOP_WEIGHT = 1.0  # of the edge from each node to itself
MAX_ROUNDS = 100
PRUNE_BELOW = 0.001  # smaller flow values become 0, except the largest value of a node
# from the paper
OFFSET = 0.01  # the similarity of two points is 1 / (OFFSET + Euclidean distance)


@dataclass(frozen=True)
class MclConfig:
    """Settings of Markov clustering and of the rule that derives K from it; defaults of Wang et al. 2025.

    Attributes:
        expansion: matrix power applied to the flow in each round.
        inflation: power applied to each value after that; larger values give more clusters.
        share: K is this fraction of the token's number of clusters, rounded down.
        large_share: fraction used instead for tokens of more than `large` clusters.
        large: see `large_share`.
        least: minimum K; a token of fewer points keeps each point as a sense.

    Raises:
        InputError: lists every setting out of range.

    Example:
        >>> MclConfig(inflation=1.8).share
        0.1
    """

    expansion: int = 2
    inflation: float = 1.65
    share: float = 0.1
    large_share: float = 0.4
    large: int = 900
    least: int = 5

    def __post_init__(self) -> None:
        checks = {
            "expansion": (2 <= self.expansion <= 100, "from 2 to 100"),
            "inflation": (1 < self.inflation <= 100, "above 1 and up to 100"),
            "share": (0 <= self.share <= 1, "from 0 to 1"),
            "large_share": (0 <= self.large_share <= 1, "from 0 to 1"),
            "large": (self.large >= 0, "0 or more"),
            "least": (self.least >= 1, "1 or more"),
        }
        wrong = [
            f"{name} is {getattr(self, name)}, but must be {valid}" for name, (ok, valid) in checks.items() if not ok
        ]
        if wrong:
            raise InputError("Markov clustering settings: " + "; ".join(wrong))
