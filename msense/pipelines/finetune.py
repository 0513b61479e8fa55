"""Fine-tune a teacher with a classifier on labelled texts.

A run is identified by a hash of everything its result depends on: repeating a command resumes from the last epoch, or does
nothing if the run is finished. Memory: the training texts.
"""

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np

from msense.config.finetune import FinetuneConfig
from msense.corpus.glue import DEV, TRAIN, Texts, pair_separator, read_split
from msense.errors import InputError
from msense.io import storage
from msense.io.extras import require
from msense.io.storage import join
from msense.pipelines.job import training_dtype
from msense.run.folder import RunFolder, locked, resolve_output
from msense.run.progress import display_progress
from msense.runtime import Executor, open_executor
from msense.teacher.classifier import LONGEST_LABEL, MAX_LABELS, ClassifierConfig
from msense.teacher.pooling import Pooling
from msense.teacher.spec import TeacherInfo, TeacherOptions, load_teacher_info
from msense.training.finetuner import TEACHER, FinetuneSettings, train_teacher

logger = logging.getLogger(__name__)
CORPUS = "corpus.jsonl"  # the training texts, as a corpus for `msense build`
DONE = "training.json"


def finetune(config: FinetuneConfig, executor: Executor | None = None) -> dict[str, Any]:
    """Fine-tune a teacher, or resume an interrupted fine-tuning.

    Returns a summary: `teacher`, its folder; `corpus`, the training texts; `epochs`, the metrics of each; `seconds`.

    Raises:
        InputError: invalid settings, data or teacher.
        MsenseError: training failed; the same command resumes from the last epoch.

    Example:
        >>> summary = finetune(FinetuneConfig(task="sst2", output="runs/teacher"))
        >>> summary["epochs"][-1]["train_loss"]
    """
    require("train", "fine-tuning a teacher")
    run = RunFolder(resolve_output(config.output))
    options = TeacherOptions(revision=config.revision, max_length=config.max_length, attention=config.attention)
    info, tokenizer = load_teacher_info(config.teacher, options)
    joiner = pair_separator(tokenizer) if len(config.data.columns.texts) > 1 else ""
    texts = read_split(config.name, config.data, config.source, TRAIN, joiner)
    pooling: Any = config.pooling or info.pooling
    if pooling not in (known := get_args(Pooling)):
        raise InputError(f"unsupported teacher pooling {pooling!r}: choose another with --pooling {'|'.join(known)}")
    labels = _labels(config, texts)
    classifier = ClassifierConfig(task=config.name, dim=info.dim, pooling=pooling, labels=labels, joiner=joiner)
    dev = _dev_split(config, joiner)
    with locked(run):
        executor = executor or open_executor(config.local, config.workers)
        settings = FinetuneSettings(
            **config.model_dump(include={"epochs", "lr", "warmup", "weight_decay", "clip", "seed"}),
            config=_resolved(config, info),
            run=run.root,
            classifier=classifier,
            max_length=info.max_length,
            has_dev=dev is not None,
            dtype=training_dtype(config.train_dtype, executor),
            device=executor.resources.device,
            threads=max(1, (os.cpu_count() or 1) // executor.resources.trainers),
        )
        name = _name(config, info, texts, dev, settings)
        done = storage.read_json(join(run.root, DONE))
        summary = {"teacher": join(run.root, TEACHER), "corpus": join(run.root, CORPUS)}
        _check_folder(config, run, summary["teacher"])
        files = (join(summary["teacher"], "config.json"), summary["corpus"])
        if done and done.get("name") == name and all(map(storage.exists, files)):
            logger.info("the teacher in %s is already finished", summary["teacher"])
            return summary | {"epochs": done["epochs"], "seconds": done["seconds"]}
        began = time.monotonic()
        with display_progress(run):
            result = executor.train(name, train_teacher, settings, run.training)
        storage.remove(join(run.root, DONE))  # not earlier: a training that fails keeps the previous result valid
        _write_corpus(texts, summary["corpus"])
        executor.run(publish_teacher, result.checkpoint, summary["teacher"])
        outcome = {"epochs": result.history, "seconds": time.monotonic() - began}
        storage.write_json(join(run.root, DONE), {"name": name, **outcome})
        storage.remove(join(run.training, name))
    return summary | outcome


def publish_teacher(checkpoint: str, uri: str) -> None:
    """Copy the teacher out of the last checkpoint, replacing an existing one."""
    storage.remove(uri)
    with storage.local_folder(checkpoint) as folder:
        storage.upload_folder(folder / TEACHER, uri)


def _check_folder(config: FinetuneConfig, run: RunFolder, teacher: str) -> None:
    """Raise if the run would replace its own input, or a folder that no fine-tuning wrote."""
    if Path(config.teacher).is_dir() and Path(config.teacher).resolve() == Path(teacher).resolve():
        raise InputError(f"--teacher {config.teacher} is the folder to be written: give another --output")
    if storage.exists(teacher) and not storage.exists(run.training):
        raise InputError(f"{teacher} exists, but was not written by `msense finetune`: give another --output")


def _labels(config: FinetuneConfig, texts: Texts) -> tuple[str, ...] | None:
    """Return the labels of the training texts; None for a regression."""
    if config.data.regression:
        return None
    labels = tuple(np.unique(texts.labels).tolist())
    if not 2 <= len(labels) <= MAX_LABELS or max(map(len, labels)) > LONGEST_LABEL:
        raise InputError(
            f"the training texts of task {config.name} have {len(labels)} different labels; 2 to {MAX_LABELS} of at most "
            f"{LONGEST_LABEL} characters are supported: give another --label-column, or --regression for numbers"
        )
    return labels


def _dev_split(config: FinetuneConfig, joiner: str) -> Texts | None:
    """Read the dev split of a folder, if there is one; GLUE has none, as its validation split is the test data."""
    if config.source == config.data.source:
        return None
    try:
        return read_split(config.name, config.data, config.source, DEV, joiner)
    except InputError as error:
        logger.info("no dev split to evaluate after each epoch (%s)", error)
        return None


def _resolved(config: FinetuneConfig, info: TeacherInfo) -> FinetuneConfig:
    """Return the settings with absolute paths and the teacher's commit, as workers may run in another folder."""
    resolved = {
        "teacher": storage.absolute(config.teacher) if Path(config.teacher).is_dir() else config.teacher,
        "revision": info.revision,
        "task": f"{config.name}={config.source if '://' in config.source else storage.absolute(config.source)}",
    }
    return config.model_copy(update=resolved)


def _name(
    config: FinetuneConfig, info: TeacherInfo, texts: Texts, dev: Texts | None, settings: FinetuneSettings
) -> str:
    """Return a hash of everything that the result depends on."""
    own = config.of_results()
    if own["attention"] == "auto":  # as in versions without it
        del own["attention"]
    inputs: dict[str, Any] = own | {
        "dtype": settings.dtype,
        "max_length": info.max_length,
        "weights": info.fingerprint,
        "tokenizer": info.tokenizer_fingerprint,
        "teacher": "",
        "prompt": info.prompt,
        "data": list(texts.fingerprints),
        "dev": list(dev.fingerprints) if dev else [],
        "columns": config.data.columns,
        "metrics": config.data.metrics,  # test splits have no influence
        "classifier": settings.classifier.model_dump(mode="json"),  # includes the teacher's own pooling
    }
    if info.truncation_side != "right":  # left out otherwise, as older versions did not have it
        inputs["truncation_side"] = info.truncation_side
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=list).encode()).hexdigest()[:16]


def _write_corpus(texts: Texts, uri: str) -> None:
    """Write the training texts as documents; an identical file keeps its time, on which dictionaries depend."""
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts.texts)
    if not storage.exists(uri) or storage.read_text(uri) != content:
        storage.write_text(uri, content)
