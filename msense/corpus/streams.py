"""Byte streams of text files: decompressed, in UTF-8, with lines that end in newlines.

Memory: a few chunks (up to 16 MiB of a file whose first line is as long and has carriage returns), and the window of a zstd
file (up to 2 GB if it was compressed with `--long=31`).
"""

import codecs
import gzip
import io
import sys
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from msense.errors import InputError
from msense.io.extras import require

CHUNK_BYTES = 1 << 18
HEAD_BYTES = 1 << 16  # decides on encoding and line ends
_LINE_BYTES = 16 << 20  # a first line with carriage returns may be as long
_LONGEST_WINDOW = 31  # log2 of the largest window that zstd supports
_MIN_UNPACKED_BYTES, _MAX_RATIO = 64 << 20, 1100  # decompression-bomb limits; gzip cannot exceed 1,032
_POINTER = b"version https://git-lfs.github.com/spec/"  # what Git LFS leaves in place of a file that is not fetched
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    *((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),  # before UTF-16, whose mark one begins with
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)


def open_text(raw: Any, codec: str, shown: str) -> io.BufferedReader:
    """Return a stream of UTF-8 with newlines of a text file; a UTF-8 mark at its start is kept.

    UTF-16 and UTF-32 are converted if the file begins with a byte-order mark. Lines may end in carriage returns.

    Args:
        raw: the seekable file, at its start.
        codec: "gz", "zst" or "".
        shown: the file in messages.

    Raises:
        InputError: UTF-16 or UTF-32 without a mark, or the pointer of Git LFS.
        OSError: while reading, a file that is truncated or corrupted.
    """
    check_pointer(raw, shown)
    chunks = _decompressed(raw, codec) if codec else iter(lambda: raw.read(CHUNK_BYTES), b"")
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= HEAD_BYTES:
            break
    encoding, ends_in_returns = check_encoding(head[:HEAD_BYTES], shown)
    if encoding != "utf-8":
        chunks = _converted(chain([head], chunks), encoding)
        head = next(chunks, b"")
    ends_in_returns = ends_in_returns and b"\n" not in head
    while ends_in_returns and len(head) < _LINE_BYTES and (chunk := next(chunks, b"")):
        head += chunk
        ends_in_returns = b"\n" not in chunk
    chunks = chain([head], chunks)
    if ends_in_returns:
        chunks = (chunk.replace(b"\r", b"\n") for chunk in chunks)
    return io.BufferedReader(_Chunks(chunks), CHUNK_BYTES)


def check_pointer(raw: Any, shown: str) -> None:
    """Raise InputError if a seekable file, at its start, is the pointer that Git LFS leaves in place of a file."""
    is_pointer = raw.read(len(_POINTER)) == _POINTER
    raw.seek(0)
    if is_pointer:
        raise InputError(f"{shown}: a pointer of Git LFS, not the file itself: run git lfs pull")


def is_plain(raw: Any, shown: str) -> bool:
    """Return whether a file is in UTF-8 with newlines, so that it may be read from any newline on."""
    return check_encoding(raw.read(HEAD_BYTES), shown) == ("utf-8", False)


def check_encoding(head: bytes, shown: str) -> tuple[str, bool]:
    """Return a file's encoding (utf-8, utf-16 or utf-32), and whether its lines end in carriage returns alone.

    Raises:
        InputError: UTF-16 or UTF-32 without a byte-order mark.
    """
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if encoding is None and (unmarked := _unmarked(head)):
        raise InputError(
            f"{shown}: its encoding looks like {unmarked.upper()} without a byte-order mark: convert it to UTF-8, for "
            f"example with iconv -f {unmarked} -t utf-8"
        )
    encoding = encoding or "utf-8"
    text = head if encoding == "utf-8" else head.decode(encoding, "ignore").encode("utf-8", "surrogatepass")
    return encoding, b"\r" in text[:-1] and b"\n" not in text


def _unmarked(head: bytes) -> str | None:
    """Return the encoding of text without a mark in two or four bytes per character; None for any other content.

    Such text has NUL bytes at least in its line ends, UTF-8 hardly ever.
    """
    nuls = head.count(0)
    if not nuls:
        return None
    wide = [name for name in ("utf-32-le", "utf-32-be") if nuls > len(head) * 0.4 and _is_text(head, name)]
    even, odd = head[::2].count(0), head[1::2].count(0)
    names, most = (("utf-16-le", "utf-16-be"), odd) if odd > even else (("utf-16-be", "utf-16-le"), even)
    mostly_latin = most > len(head) * 0.1 and nuls - most < most / 4
    if wide or mostly_latin:
        return [*wide, names[0]][0]
    return None if _decodes(head, "utf-8") else next((name for name in names if _is_text(head, name)), None)


def _is_text(data: bytes, encoding: str) -> bool:
    """Return whether the start of a text decodes to assigned characters, with white space among them."""
    if not _decodes(data, encoding):
        return False
    text = data.decode(encoding, "ignore")
    return any(c in text for c in "\n\r ") and not any(unicodedata.category(c) in ("Cn", "Co", "Cs") for c in text)


def _decodes(data: bytes, encoding: str) -> bool:
    """Return whether the start of a text decodes; its last character may be incomplete."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeDecodeError:
        return False
    return True


def _decompressed(raw: Any, codec: str) -> Iterator[bytes]:
    """Yield the decompressed chunks of a file of one or several members or frames."""
    opened, errors = (gzip.GzipFile(fileobj=raw), zlib.error) if codec == "gz" else _open_zstd(raw)
    size = 0
    with opened as stream:
        try:
            while chunk := stream.read(CHUNK_BYTES):
                size += len(chunk)
                if size > _MIN_UNPACKED_BYTES + _MAX_RATIO * raw.tell():
                    raise OSError(f"its decompressed size exceeds {_MAX_RATIO} times its own")
                yield chunk
        except (EOFError, errors) as error:
            raise OSError(str(error)) from error


def _open_zstd(raw: Any) -> tuple[Any, type[Exception]]:
    """Return a stream of a zstd file and the type of its errors; the package is of the extra `build`."""
    if sys.version_info >= (3, 14):
        from compression.zstd import DecompressionParameter, ZstdError, ZstdFile
    else:
        require("build", "reading a .zst file", ("backports.zstd",))
        from backports.zstd import DecompressionParameter, ZstdError, ZstdFile
    return ZstdFile(raw, options={DecompressionParameter.window_log_max: _LONGEST_WINDOW}), ZstdError


def _converted(chunks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """Convert UTF-16 or UTF-32 to UTF-8; lone surrogates give bytes that are not UTF-8."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    try:
        for chunk in chunks:
            yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise OSError(str(error)) from error


class _Chunks(io.RawIOBase):
    """A raw stream of chunks of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left and (chunk := next(self._chunks, None)) is not None:
            self._left = memoryview(chunk)
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size
