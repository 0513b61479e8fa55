"""The corpus: URIs in, documents out. `files` says what there is, `readers` reads it, `pydocs` is the embedded one."""

from msense.corpus.files import (
    WHOLE,
    Piece,
    SourceFile,
    count_rows,
    cut_pieces,
    display_uri,
    fingerprint_of,
    list_files,
    number_pieces,
)
from msense.corpus.readers import BadDocument, Document, read_documents

__all__ = [
    "WHOLE",
    "BadDocument",
    "Document",
    "Piece",
    "SourceFile",
    "count_rows",
    "cut_pieces",
    "display_uri",
    "fingerprint_of",
    "list_files",
    "number_pieces",
    "read_documents",
]
