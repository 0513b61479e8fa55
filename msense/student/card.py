"""Write a student's model card; nothing in a config or a metric name can break out of its YAML or its tables."""

import re
from collections.abc import Mapping

from msense.student.config import StudentConfig
from msense.text import one_line, redact

MODULE = "msense.student.sentence_transformer.SenseModule"  # the class that sentence-transformers loads
_CARD = """---
{metadata}
---

# Sense-aware sentence encoder

A small encoder distilled from {teacher} with [msense](https://arxiv.org/abs/2504.06036). It returns one vector per text
and, for every token, one of its *senses*: the clusters of the teacher's contextual embeddings of that token.

| | |
|---|---|
{stats}
{evaluation}
## Usage

```python
from msense import SenseEncoder

encoder = SenseEncoder.from_pretrained("path/or/name")
encoder.encode(["a river bank", "a bank account"])    # float32 [2, {dim}]
encoder.tokens("a river bank")                        # token, sense, probability, example; requires the dictionary
```

With sentence-transformers (msense must be installed):

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/or/name", trust_remote_code=True)
model.encode(["a river bank", "a bank account"])
```

sentence-transformers 6 requires `trust_remote_code=True` because `modules.json` names a class of another package,
`{module}` of the installed msense. This folder contains no code: check that it has no `.py` file.

## Licence

The student is derived from the weights of {teacher} and is subject to their licence: read it before you share this
folder. `dictionary/exemplars.parquet`, if present, quotes the corpus and is subject to the corpus's licence.
"""


def student_card(config: StudentConfig, senses: str, figures: Mapping[str, float]) -> str:
    """Return the model card (Markdown with YAML front matter) of a student whose dictionary is stored as `senses`."""
    from huggingface_hub import ModelCardData

    teacher = redact(config.teacher.name)
    is_hub_name = re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", teacher)
    metadata = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "msense", "feature-extraction", "sentence-similarity"],
        base_model=teacher if is_hub_name else None,
    )
    stats = {
        "student": redact(config.kind),
        "teacher": teacher + (f" (revision {config.teacher.revision})" if config.teacher.revision else ""),
        "dimension": config.dim,
        "pooling": config.pooling + (", normalized" if config.normalize else ""),
        "maximum length": f"{config.max_length} tokens",
        "prompt": repr(config.prompt) if config.prompt else "none",
        "dictionary": "not included" if senses == "none" else f"in `dictionary/`, stored as {senses}",
    }
    metrics = _rows({name: f"{value:.6g}" for name, value in figures.items()})
    return _CARD.format(
        metadata=metadata.to_yaml(),
        teacher=one_line(teacher),
        stats=_rows(stats),
        evaluation=f"\n## Evaluation\n\n| | |\n|---|---|\n{metrics}\n" if figures else "",
        dim=config.dim,
        module=MODULE,
    )


def _rows(table: Mapping[str, object]) -> str:
    return "\n".join(f"| {one_line(name)} | {one_line(value)} |" for name, value in table.items())
