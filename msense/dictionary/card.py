"""The model card of a dictionary; no value from its config can break out of the Markdown or the YAML front matter."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from huggingface_hub import ModelCard, ModelCardData

from msense.text import one_line, redact

if TYPE_CHECKING:
    from msense.dictionary.layout import Arrays, DictionaryConfig

_BODY = """# Sense dictionary

Centroids (*senses*) of the contextual embeddings of each token in the teacher's vocabulary, clustered over a corpus.
Each embedding is replaced by the nearest sense of its own token; the teacher's pooling and heads apply unchanged.

| | |
|---|---|
{table}

## Usage

```python
from msense import SenseDictionary

dictionary = SenseDictionary.load("path/to/this/folder")
dictionary.lookup("bank")                          # the word's tokens and their numbers of senses
dictionary.assign(token_ids, embeddings)         # [N], [N, D] -> sense numbers [N]
dictionary.replace(token_ids, embeddings)        # [N], [N, D] -> [N, D]
```

`python -m msense show path/to/this/folder bank` prints the senses of a word with example contexts.

## License

The senses are derived from the weights of {teacher} and subject to its license: read it before you share this folder.
`exemplars.parquet`, if present, quotes the corpus and is subject to the corpus's license.
"""


def markdown_table(rows: Mapping[str, object]) -> str:
    """Return the lines of a table of names and values."""
    return "\n".join(f"| {one_line(name)} | {one_line(value)} |" for name, value in rows.items())


def base_model(teacher: str) -> str | None:
    """Return a teacher's name for a card's metadata if it may be that of a Hub repository."""
    return teacher if re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", teacher) else None


def model_card(config: "DictionaryConfig", arrays: "Arrays") -> str:
    """Return the text of a dictionary's README.md."""
    name, revision = redact(config.teacher.name), config.teacher.revision
    sizes = np.diff(arrays.offsets)
    rows = {
        "teacher": name + (f" (revision {revision})" if revision else ""),
        "layer": config.layer,
        "pooling": config.pooling,
        "senses": f"{len(arrays.counts):,} of {int((sizes > 0).sum()):,} tokens, at most {int(sizes.max(initial=0)):,} "
        f"per token (setting: {config.senses})",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "width": f"{config.dim}, stored as {config.dtype}",
        "metric": config.metric,
        "mean squared distance": f"{config.temperature_unit:.6g} (the unit of temperatures)",
        "points clustered": f"{int(arrays.counts.sum()):,}",
        "occurrences in the corpus": f"{int(arrays.token_counts.sum()):,}",
        "special tokens": config.special_tokens,
        "maximum passage length": f"{config.max_length} tokens",
        **{key: f"{value:.6g}" for key, value in sorted(config.quality.items())},
    }
    data = ModelCardData(base_model=base_model(name), library_name="msense", tags=["msense", "sense-dictionary"])
    body = _BODY.format(table=markdown_table(rows), teacher=one_line(rows["teacher"]))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}", ignore_metadata_errors=True))
