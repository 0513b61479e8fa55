"""Constants that several packages share: limits of what is read, and the demo."""

from typing import Literal

VERSION = "0.1.0"
DEMO_TEACHER = "all-MiniLM-L6-v2"
MAX_SENSES, NO_SENSE = 65_534, 65_535  # labels are uint16; `NO_SENSE` marks tokens without a sense
LARGEST_VALUE = 1e15  # of embeddings for k-means, so that sums of squares of any width fit into float32
MAX_VOCABULARY = 1 << 22  # current models have less than 2^19
MAX_DIM = 1 << 16
MAX_TOKEN_NUMBERS = 1 << 28  # of the centroids of a token, which are read at once: 1 GiB in float32
MAX_EXEMPLARS = 1024  # of a sense
LISTED_BAD_DOCUMENTS = 100  # of each kind, in bad_documents.jsonl
MAX_INT32 = 2**31 - 1
DEFAULT_TEMPERATURE = 1 / 3  # in units of a dictionary's mean squared RMS distance
Metric = Literal["l2", "dot", "cosine"]
Replace = Literal["hard", "soft"]
