"""Constants that several packages share: limits of what is read, and the demo."""

from typing import Literal

VERSION = "0.1.0"
DEMO_TEACHER = "all-MiniLM-L6-v2"
MAX_SENSES, NO_SENSE = 65_534, 65_535  # labels are uint16; the second says "none"
LARGEST_VALUE = 1e15  # of an embedding that k-means takes: float32 holds sums of such squares of any width
MAX_VOCABULARY = 1 << 22  # the largest of today's is below 2^19
MAX_DIM = 1 << 16
MAX_TOKEN_NUMBERS = 1 << 28  # of one token's centroids, which are read at once: 1 GiB in float32
MAX_EXEMPLARS = 1024  # of one sense
MANY = 2**31 - 1  # more of anything fits no array of ours
Metric = Literal["l2", "dot", "cosine"]
