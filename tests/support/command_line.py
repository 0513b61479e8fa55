"""Settings from flags, as a command reads them."""

from collections.abc import Sequence
from typing import TypeVar

from msense.cli.flags import Job, call
from msense.config.base import JobConfig

JobT = TypeVar("JobT", bound=JobConfig)


def parse_flags(model: type[JobT], words: Sequence[str]) -> JobT:
    """Return the settings of a command line without the name of the command."""
    parsed: list[JobT] = []
    call(Job(model, parsed.append, lambda _: None).app("job", ""), list(words))
    return parsed[0]
