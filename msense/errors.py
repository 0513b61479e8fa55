"""The errors that msense raises on purpose; any other error is a bug.

Every message has the value, the cause and the remedy. The command line maps them to exit codes: `InputError` to 2 (wrong
usage or input), any other `MsenseError` to 1 (the run failed).
"""


class MsenseError(Exception):
    """A run failed."""


class InputError(MsenseError, ValueError):
    """Wrong usage, or input that is invalid or unsupported."""


class DictionaryError(InputError):
    """A dictionary folder is truncated, inconsistent or not a dictionary."""


class StudentError(InputError):
    """A student cannot be built from its inputs, or its folder is truncated, inconsistent or not a student."""


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic of a library in Rust, whose type, a BaseException, cannot be imported."""
    return type(error).__name__ == "PanicException"
