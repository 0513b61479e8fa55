"""The tasks that models are evaluated on, a module each."""

from msense.corpus.files import read_errors
from msense.io import storage
from msense.io.extras import NEEDED_BY_EVALUATIONS, require

require("evaluation", "an evaluation", NEEDED_BY_EVALUATIONS)
_MAX_BYTES = 64 << 20  # of a text file


def read_lines(uri: str) -> list[str]:
    """Read the lines of a text file; InputError if it is missing or too large."""
    with read_errors(uri, "text"):
        text = storage.read_bytes(uri, _MAX_BYTES).decode("utf-8-sig", "replace")
    return text.removesuffix("\n").split("\n")
