"""A dictionary's README: what it is, where it comes from, its figures.

Comes in: its config and small arrays. Goes out: Markdown that nothing in them can break out of.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from msense.dictionary.format import Arrays, DictionaryConfig


def model_card(config: "DictionaryConfig", arrays: "Arrays") -> str:
    """Return the dictionary's README: what it is, where it comes from, its figures, how to load it, its licence."""
    teacher = config.teacher.name + (f" (revision {config.teacher.revision})" if config.teacher.revision else "")
    clustered = int((np.diff(arrays.offsets) > 0).sum())
    largest = int(np.diff(arrays.offsets).max(initial=0))
    facts = {
        "teacher": teacher,
        "layer": config.layer,
        "pooling": config.pooling,
        "senses": f"{len(arrays.counts):,} of {clustered:,} tokens, {largest:,} of one at most (setting: {config.senses})",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "width": f"{config.dim}, stored as {config.dtype}",
        "metric": config.metric,
        "mean squared spread": f"{config.temperature_unit:.6g} (the unit of temperatures)",
        "points clustered": f"{int(arrays.counts.sum()):,}",
        "occurrences in the corpus": f"{int(arrays.token_counts.sum()):,}",
        "special tokens": config.special_tokens,
        "longest passage": f"{config.max_length} tokens",
        **{one_line(name): f"{value:.6g}" for name, value in sorted(config.quality.items())},
    }
    table = "\n".join(f"| {name} | {one_line(value)} |" for name, value in facts.items())
    return f"""# Sense dictionary

For each token of the teacher's vocabulary: centroids of its contextual embeddings over a corpus, its *senses*.
An embedding is replaced by the nearest sense of its own token; the teacher's pooling and heads work on as before.

| | |
|---|---|
{table}

## Use

```python
from msense import SenseDictionary

dictionary = SenseDictionary.load("path/to/this/folder")
dictionary.find("bank")                          # the word's tokens, and how many senses each has
dictionary.assign(token_ids, embeddings)         # [N], [N, D] -> sense numbers [N]
dictionary.replace(token_ids, embeddings)        # [N], [N, D] -> [N, D]
```

`python -m msense show path/to/this/folder bank` prints a word's senses with examples.

## Licence

The senses are derived from the weights of {one_line(teacher)}: its licence holds for them too;
read it before sharing this folder. If exemplars.parquet is here, it quotes the corpus, whose licence holds for it.
"""


def one_line(value: object) -> str:
    """Return text that cannot break out of a table cell."""
    return "".join(c if c.isprintable() else " " for c in str(value)).replace("|", "/")
