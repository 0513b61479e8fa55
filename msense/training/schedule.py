"""Learning-rate schedules."""

import math


def lr_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """Return the learning-rate factor of a step: linear warm-up, then cosine, linear or constant.

    `one-cycle` rises from 1/25 and falls to 1/250,000, both along a cosine (Smith and Topin 2019; defaults of PyTorch).
    """
    warm = warmup * steps
    if step < warm:
        return _cosine(1 / 25, 1.0, step / warm) if schedule == "one-cycle" else (step + 1) / (warm + 1)
    done = (step - warm) / max(1.0, steps - warm)
    lowest = 1 / 250_000 if schedule == "one-cycle" else 0.0
    return {"constant": 1.0, "linear": 1 - done}.get(schedule, _cosine(1.0, lowest, done))


def _cosine(first: float, last: float, share: float) -> float:
    """Interpolate between two numbers along half a cosine."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))
