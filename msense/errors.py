"""The errors msense raises on purpose; anything else that comes out is a bug.

Every message names the value, the cause and the remedy. The jobs map them to exit codes:
`BadInput` to 2 (wrong usage or bad input), `MsenseError` to 1 (the run failed).
"""


class MsenseError(Exception):
    """A run that cannot go on; exit code 1."""


class InputError(MsenseError):
    """Wrong usage, or input that msense refuses; exit code 2."""


class DictionaryError(InputError):
    """A dictionary folder that is truncated, foreign or inconsistent."""


class StudentError(InputError):
    """A student that cannot be made of what was given, or a student folder that is truncated, foreign or inconsistent."""


def is_panic(error: BaseException) -> bool:
    """Tell whether a library written in Rust gave up: pyo3 makes that a BaseException of a type that cannot be imported."""
    return type(error).__name__ == "PanicException"
