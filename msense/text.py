"""Text for people: fit for a terminal, a log or a file, whoever wrote it."""

import os
import re
import unicodedata

_USER = re.compile(r"://[^\s/'\"<>]*@")
_QUERY = re.compile(r"(://[^\s?#'\"<>)]*)[?#][^\s'\"<>)]*")
_TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|(?<=Bearer )[^\s'\"]{8,}|(?<=Signature=)[^\s'\"&]{8,}",
    re.ASCII,
)
_NAMES = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL|_AUTH\b", re.IGNORECASE)
_LONGEST = 1000  # letters of what a library says
_SHORTEST = 8  # letters of a secret: "true" and numbers are none
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
    """Return text without secrets: URIs have no user, password, query and fragment, and no known token is left.

    Known are the values of this process's environment under names of secrets, and what looks like a token of the hub, of
    AWS, or of an HTTP header.
    """
    text = _QUERY.sub(r"\1", _USER.sub("://", text))
    for secret in _secrets():
        text = text.replace(secret, "***")
    return _TOKEN.sub("***", text)


def _secrets() -> list[str]:
    """Return the secrets in the environment, the longest first: one may be in another."""
    found = {value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= _SHORTEST}
    return sorted((value for value in found if value[0] != "/"), key=len, reverse=True)


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
    told = redact(kind + " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")]))
    return told if len(told) <= _LONGEST else told[:_LONGEST] + "..."  # some quote the value that they were given
