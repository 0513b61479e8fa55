"""Text for people: fit for a terminal, a log or a file, whoever wrote it."""

import re
import unicodedata

_USER = re.compile(r"://[^\s/'\"<>]*@")
_QUERY = re.compile(r"(://[^\s?#'\"<>)]*)[?#][^\s'\"<>)]*")
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")


def size(count: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def clean(text: str) -> str:
    """Return text without escape sequences, control, format and other invisible characters; line breaks are spaces."""
    text = _ESCAPES.sub("", text)
    return "".join(
        " " if c in "\n\r\t" or (kind := unicodedata.category(c)) in ("Zl", "Zp") else "" if kind[0] == "C" else c
        for c in text
    )


def plain(text: str) -> str:
    """Return lines fit for a terminal, a log or a file: clean, and without the credentials and queries of URIs."""
    return "\n".join(redact(clean(line)) for line in text.split("\n"))


def redact(text: str) -> str:
    """Return text whose URIs have no user, password, query and fragment."""
    return _QUERY.sub(r"\1", _USER.sub("://", text))


def is_utf8(text: str) -> bool:
    """Tell whether text can be written down; a file name of other bytes cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says; of errors that say little without it, with the kind."""
    kind = f"{type(error).__name__}: " if isinstance(error, LookupError | TypeError | AttributeError) else ""
    lines = (str(error).strip() or "no reason given").splitlines()
    return redact(kind + " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")]))
