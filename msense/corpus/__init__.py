"""Corpus access: list files (`files`), cut them into input splits (`splits`) and stream their documents (`readers`)."""

from msense.corpus.files import SourceFile, current_fingerprint, list_files
from msense.corpus.readers import BadDocument, Document, read_documents
from msense.corpus.splits import WHOLE, InputSplit, count_rows, cut_splits, number_splits
from msense.io.filesystems import display_uri

__all__ = [
    "WHOLE", "BadDocument", "Document", "InputSplit", "SourceFile", "count_rows", "current_fingerprint", "cut_splits",
    "display_uri", "list_files", "number_splits", "read_documents",
]  # fmt: skip
