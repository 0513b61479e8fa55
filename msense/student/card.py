"""A shipped student's README: what it is, its figures, how to load it, its licence.

Comes in: its config, the type of its dictionary's numbers, figures. Goes out: Markdown with the front matter that the hub
reads, which nothing in them can break out of.
"""

import json
import re
from collections.abc import Mapping

from msense.dictionary.card import one_line
from msense.student.config import StudentConfig
from msense.text import redact

MODULE = "msense.sentence_module.SenseModule"  # what sentence-transformers makes of the folder


def student_card(config: StudentConfig, senses: str, figures: Mapping[str, float]) -> str:
    """Return a shipped student's README: what it is, its figures, how to load it, its licence."""
    teacher = redact(config.teacher.name)
    named = re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", teacher)
    base = f"base_model: {json.dumps(teacher)}\n" if named else ""
    left_out = "left out: sentence vectors only"
    facts = {
        "student": redact(config.kind),
        "teacher": teacher + (f" (revision {config.teacher.revision})" if config.teacher.revision else ""),
        "width": config.dim,
        "pooling": config.pooling + (", length 1" if config.normalize else ""),
        "longest text": f"{config.max_length} tokens",
        "prompt": repr(config.prompt) if config.prompt else "none",
        "dictionary": left_out if senses == "none" else f"in `dictionary/`, stored as {senses}",
    }
    rows, measured = (
        "\n".join(f"| {one_line(name)} | {one_line(value)} |" for name, value in table.items())
        for table in (facts, {name: f"{value:.6g}" for name, value in figures.items()})
    )
    figures_table = f"\n## Figures\n\n| | |\n|---|---|\n{measured}\n" if figures else ""
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, msense, feature-extraction, sentence-similarity]
{base}---

# A student that speaks in senses

A small encoder distilled from {one_line(teacher)} with [msense](https://arxiv.org/abs/2504.06036): for a text a sentence
vector, and for every token one of the *senses* that the teacher's embeddings of that token fall into.

| | |
|---|---|
{rows}
{figures_table}
{_use(config, teacher)}"""


def _use(config: StudentConfig, teacher: str) -> str:
    return f"""## Use

```python
from msense import SenseEncoder

encoder = SenseEncoder.from_pretrained("path/or/name")
encoder.encode(["a river bank", "a bank account"])    # float32 [2, {config.dim}]
encoder.tokens("a river bank")                        # token, sense, probability, example; asks for the dictionary
```

With sentence-transformers, msense being installed:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/or/name", trust_remote_code=True)
model.encode(["a river bank", "a bank account"])
```

Version 6 of sentence-transformers asks for `trust_remote_code=True` wherever `modules.json` names a class of another
package, here `{MODULE}` of the installed msense. No code lies in this folder: look that no
`.py` is in it.

## Licence

The student is derived from the weights of {one_line(teacher)}: its licence holds for it too; read it before sharing this
folder. If dictionary/exemplars.parquet is here, it quotes the corpus, whose licence holds for it.
"""
