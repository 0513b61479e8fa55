"""Write a complete student folder: weights, tokenizer, dictionary, model card, files of sentence-transformers."""

import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

from huggingface_hub import ModelCardData

from msense.dictionary import SenseDictionary
from msense.dictionary.card import base_model, markdown_table
from msense.dictionary.layout import Stored
from msense.errors import StudentError
from msense.io.scratch import atomic_path, copy_file
from msense.student.config import StudentConfig, check_dictionary
from msense.student.files import WeightDtype, save_config, save_weights
from msense.student.layout import StudentFiles
from msense.student.portable import find_obstacle, prompt_settings, write_json, write_modules
from msense.student.student import Student
from msense.student.tokenizer import StudentTokenizer
from msense.text import one_line, redact

logger = logging.getLogger(__name__)
StoredSenses = Stored | Literal["none"]
_MODULE = "msense.student.sentence_transformer.SenseModule"  # the class that sentence-transformers loads
_STATIC = (
    "a static student is a convolution and an MLP over token embeddings, for which sentence-transformers has no module"
)
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

{usage}
## Licence

The student is derived from the weights of {teacher} and is subject to their licence: read it before you share this
folder. `{dictionary}/exemplars.parquet`, if present, quotes the corpus and is subject to the corpus's licence.
"""

_PORTABLE = """With sentence-transformers (without msense; `senses/` has what only msense reads: copy it along with the rest):

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/or/name")
model.encode(["a river bank", "a bank account"])
```
"""
_TABLE = """
model2vec reads the same folder, `StaticModel.from_pretrained("path/or/name")`; it leaves out unknown tokens and prompts.
"""
_OWN_CLASS = """With sentence-transformers (msense must be installed):

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/or/name", trust_remote_code=True)
model.encode(["a river bank", "a bank account"])
```

The flag is needed because {obstacle}: `modules.json` names a class of the installed msense, `{module}`. This folder contains
no code: check that it has no `.py` file.
"""


def save_pretrained(
    folder: str | Path,
    student: Student,
    dictionary: SenseDictionary,
    *,
    senses: StoredSenses = "float16",
    dtype: WeightDtype = "float32",
    figures: Mapping[str, float] | None = None,
) -> None:
    """Write a folder that `SenseEncoder` and sentence-transformers load, replacing an existing one; the config last.

    A table, and a transformer where possible, is a model of sentence-transformers itself (see `StudentFiles`): it needs
    neither msense nor remote code there.

    Of the dictionary, which must have a tokenizer, centroids are stored as `senses`; "none" leaves it out (sentence vectors
    only). The weights are stored as `dtype`. `figures` are metrics for the model card.

    Raises:
        StudentError: student and dictionary do not match, the dictionary has no tokenizer, or a weight exceeds the range of
            `dtype`.
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
    reader = StudentTokenizer(source, config)  # validates the tokenizer before anything is written
    layouts = [StudentFiles(Path(folder), portable=portable) for portable in (False, True)]
    # of a former student, also of one that was not wholly written; another folder's files stay
    own = layouts[0].modules.is_file()
    stale = {path for old in layouts for path in old.present(exemplars=True)} if own else set()
    for old in layouts:
        old.config.unlink(missing_ok=True)
    old.folder.mkdir(parents=True, exist_ok=True)
    for path in (*old.dense_files(), old.onnx) if own else ():
        path.unlink(missing_ok=True)
    files, obstacle = _write_model(old.folder, student, config, source, reader, dtype)
    stale |= set(layouts[1].model_files()) - set(files.model_files())
    if senses == "none":
        shutil.rmtree(files.dictionary, ignore_errors=True)
    else:
        dictionary.save(files.dictionary, dtype=senses)
    with atomic_path(files.card) as scratch:
        scratch.write_text(student_card(config, senses, figures or {}, obstacle), encoding="utf-8")
    _remove(stale - set(files.present(exemplars=True)), old.folder)
    save_config(files, config)


def _write_model(
    folder: Path, student: Student, config: StudentConfig, source: Path, reader: StudentTokenizer, dtype: WeightDtype
) -> tuple[StudentFiles, str | None]:
    """Write all that gives vectors but the student's config; return the files, and why they are not portable."""
    obstacle = _STATIC if config.static is not None else None
    if obstacle is None:
        files = StudentFiles(folder, portable=True)
        copy_file(source, files.tokenizer)
        save_weights(files, student, reader.rows, dtype)
        write_modules(files, student, config, reader.tokenizer)
        obstacle = None if config.is_table else find_obstacle(files, student, reader, dtype)
        if obstacle is None:
            return files, None
        logger.warning("the student needs trust_remote_code=True in sentence-transformers: %s", obstacle)
    files = StudentFiles(folder, portable=False)
    copy_file(source, files.tokenizer)
    save_weights(files, student, dtype=dtype)
    write_json(files.modules, [{"idx": 0, "name": "0", "path": "", "type": _MODULE}])
    write_json(files.settings, prompt_settings(config))
    return files, obstacle


def _remove(paths: set[Path], root: Path) -> None:
    """Remove files below `root`, and the folders that they leave empty."""
    for path in paths:
        path.unlink(missing_ok=True)
    folders = {parent for path in paths for parent in path.parents if root in parent.parents}
    for folder in sorted(folders, reverse=True):  # those within a folder before it
        with suppress(OSError):
            folder.rmdir()


def student_card(config: StudentConfig, senses: str, figures: Mapping[str, float], obstacle: str | None = None) -> str:
    """Return the model card (Markdown with YAML front matter) of a student whose dictionary is stored as `senses`.

    `obstacle` is why the student is not portable; None if it is.
    """
    teacher = redact(config.teacher.name)
    metadata = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "msense", "feature-extraction", "sentence-similarity"],
        base_model=base_model(teacher),
    )
    dictionary = StudentFiles(Path(), portable=obstacle is None).dictionary.as_posix()
    stats = {
        "student": redact(config.kind),
        "teacher": teacher + (f" (revision {config.teacher.revision})" if config.teacher.revision else ""),
        "dimension": config.sentence_dim,
        "pooling": config.pooling + (", normalized" if config.normalize else ""),
        "maximum length": "unlimited" if config.is_table else f"{config.max_length} tokens",
        "prompt": repr(config.prompt) if config.prompt else "none",
        "dictionary": "not included" if senses == "none" else f"in `{dictionary}/`, stored as {senses}",
    }
    metrics = markdown_table({name: f"{value:.6g}" for name, value in figures.items()})
    usage = _PORTABLE + (_TABLE if config.is_table and not (config.projections or config.truncate_dim) else "")
    if obstacle is not None:
        usage = _OWN_CLASS.format(obstacle=one_line(obstacle), module=_MODULE)
    return _CARD.format(
        metadata=metadata.to_yaml(),
        teacher=one_line(teacher),
        stats=markdown_table(stats),
        evaluation=f"\n## Evaluation\n\n| | |\n|---|---|\n{metrics}\n" if figures else "",
        dim=config.sentence_dim,
        usage=usage,
        dictionary=dictionary,
    )
