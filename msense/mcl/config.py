"""Settings of Markov clustering and of the rule that takes K from it.

In: numbers. Out: one checked, frozen object. No torch.
"""

from dataclasses import dataclass

import numpy as np

from msense.errors import BadInput


@dataclass(frozen=True)
class MclConfig:
    """Settings of Markov clustering, and of the rule that takes K from it (Wang et al. 2025); defaults are the paper's.

    Attributes:
        expansion: power that the flow is raised to in a round.
        inflation: power of its values after that.
        loop_value: weight of every node's edge to itself; 0 leaves the diagonal as it is.
        max_rounds: most rounds.
        prune: values below this become 0 (but not a column's largest); 0 never prunes.
        prune_every: prune in every so manieth round.
        check_every: look for convergence in every so manieth round.
        offset: similarity of two points is 1 / (offset + Euclidean distance).
        share: K is this share of a token's clusters, rounded down,
        large_share: or this share where it has more clusters than
        large: so many,
        least: but at least so many; a token of fewer points keeps all of them as senses.

    Raises:
        BadInput: lists every setting that is out of range.
    """

    expansion: int = 2
    inflation: float = 1.65
    loop_value: float = 1.0
    max_rounds: int = 100
    prune: float = 0.001
    prune_every: int = 1
    check_every: int = 1
    offset: float = 0.01
    share: float = 0.1
    large_share: float = 0.4
    large: int = 900
    least: int = 5

    def __post_init__(self) -> None:
        bounds = {
            "expansion": (2, 100, "from 2 to 100"),
            "inflation": (np.nextafter(1, 2), 100, "above 1 and up to 100"),
            "loop_value": (0, 1e6, "from 0 to 1e6"),
            "max_rounds": (1, np.inf, "1 or more"),
            "prune": (0, np.nextafter(1, 0), "from 0 to below 1"),
            "prune_every": (1, np.inf, "1 or more"),
            "check_every": (1, np.inf, "1 or more"),
            "offset": (1e-6, 1e6, "from 1e-6 to 1e6"),
            "share": (0, 1, "from 0 to 1"),
            "large_share": (0, 1, "from 0 to 1"),
            "large": (0, np.inf, "0 or more"),
            "least": (1, np.inf, "1 or more"),
        }
        wrong = [
            f"{name} is {getattr(self, name)}, but must be {told}"
            for name, (low, high, told) in bounds.items()
            if not low <= getattr(self, name) <= high
        ]
        if wrong:
            raise BadInput("Markov clustering settings: " + "; ".join(wrong))
