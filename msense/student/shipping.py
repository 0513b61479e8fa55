"""Write a complete student folder: weights, tokenizer, dictionary, model card, files of sentence-transformers."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from huggingface_hub import ModelCardData

from msense.dictionary import SenseDictionary
from msense.dictionary.card import base_model, markdown_table
from msense.dictionary.layout import Stored
from msense.errors import StudentError
from msense.io.scratch import atomic_path, copy_file
from msense.student.config import StudentConfig, StudentFiles, check_dictionary
from msense.student.files import save_student
from msense.student.student import Student
from msense.student.tokenizer import StudentTokenizer
from msense.text import one_line, redact

StoredSenses = Stored | Literal["none"]
_MODULE = "msense.student.sentence_transformer.SenseModule"  # the class that sentence-transformers loads
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


def save_pretrained(
    folder: str | Path,
    student: Student,
    dictionary: SenseDictionary,
    *,
    senses: StoredSenses = "float16",
    figures: Mapping[str, float] | None = None,
) -> None:
    """Write a folder that `SenseEncoder` and sentence-transformers load, replacing an existing one; config.json last.

    Of the dictionary, which must have a tokenizer, centroids are stored as `senses`; "none" leaves it out (sentence vectors
    only). `figures` are metrics for the model card.

    Raises:
        StudentError: student and dictionary do not match, or the dictionary has no tokenizer.
        DictionaryError: the centroids exceed the range of `senses`.
    """
    allowed = (*get_args(Stored), "none")
    if senses not in allowed:
        raise StudentError(f"invalid senses {senses!r}: use one of {allowed}")
    config = student.config
    if Path(config.kind).is_absolute():
        config = config.model_copy(update={"kind": Path(config.kind).name})  # do not publish local paths
    check_dictionary(config, dictionary.config)
    source = dictionary.tokenizer_file
    if source is None:
        raise StudentError("the dictionary has no tokenizer: load one that was built from a teacher")
    StudentTokenizer(source, config)  # validates the tokenizer before anything is written
    files = StudentFiles(Path(folder))
    files.folder.mkdir(parents=True, exist_ok=True)
    files.config.unlink(missing_ok=True)
    copy_file(source, files.tokenizer)
    if senses == "none":
        shutil.rmtree(files.dictionary, ignore_errors=True)
    else:
        dictionary.save(files.dictionary, dtype=senses)
    prompts = {"default": config.prompt} if config.prompt else {}
    settings = {
        "model_type": "SentenceTransformer",
        "prompts": prompts,
        "default_prompt_name": next(iter(prompts), None),
    }
    settings["similarity_fn_name"] = "cosine"
    modules = [{"idx": 0, "name": "0", "path": "", "type": _MODULE}]
    texts = {files.modules: json.dumps(modules, indent=1) + "\n", files.settings: json.dumps(settings, indent=1) + "\n"}
    for path, text in {**texts, files.card: student_card(config, senses, figures or {})}.items():
        with atomic_path(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
    save_student(folder, student, config)


def student_card(config: StudentConfig, senses: str, figures: Mapping[str, float]) -> str:
    """Return the model card (Markdown with YAML front matter) of a student whose dictionary is stored as `senses`."""
    teacher = redact(config.teacher.name)
    metadata = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "msense", "feature-extraction", "sentence-similarity"],
        base_model=base_model(teacher),
    )
    stats = {
        "student": redact(config.kind),
        "teacher": teacher + (f" (revision {config.teacher.revision})" if config.teacher.revision else ""),
        "dimension": config.sentence_dim,
        "pooling": config.pooling + (", normalized" if config.normalize else ""),
        "maximum length": f"{config.max_length} tokens",
        "prompt": repr(config.prompt) if config.prompt else "none",
        "dictionary": "not included" if senses == "none" else f"in `dictionary/`, stored as {senses}",
    }
    metrics = markdown_table({name: f"{value:.6g}" for name, value in figures.items()})
    return _CARD.format(
        metadata=metadata.to_yaml(),
        teacher=one_line(teacher),
        stats=markdown_table(stats),
        evaluation=f"\n## Evaluation\n\n| | |\n|---|---|\n{metrics}\n" if figures else "",
        dim=config.sentence_dim,
        module=_MODULE,
    )
