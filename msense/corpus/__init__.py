"""Corpus access: list files (`files`), cut them into input splits (`pieces`) and stream their documents (`readers`)."""

from msense.corpus.files import SourceFile, display_uri, fingerprint_of, list_files
from msense.corpus.pieces import WHOLE, Piece, count_rows, cut_pieces, number_pieces
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
