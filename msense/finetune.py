"""A fine-tuning on Ray Train: a teacher and labelled texts in, a teacher with a classifier out.

Runs on the driver, which holds settings, metrics and, while it writes them down, the training texts. A fine-tuning is known by
all that its result depends on: the same command goes on from the last epoch, or leaves what is finished as it is.
"""

import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msense import storage
from msense.classifier import LONGEST_LABEL, MAX_LABELS, ClassifierConfig
from msense.config import BuildConfig
from msense.errors import BadInput
from msense.finetune_config import FinetuneConfig
from msense.glue import DEV, TRAIN, GlueTask, Texts, joiner_of, read_part
from msense.ray_train import fit
from msense.run_folder import RunFolder, lasting, locked
from msense.runtime import Resources, connect, run_task
from msense.storage import join
from msense.student.config import Pooling
from msense.teacher import TeacherInfo, describe, resolve_dtype

logger = logging.getLogger(__name__)

CORPUS = "corpus.jsonl"  # the training texts, for build_dict.py
DONE = "training.json"
TEACHER = "teacher"  # folder of the last checkpoint


@dataclass(frozen=True)
class Tuning:
    """Everything a worker needs to know.

    Attributes:
        run: run folder, for progress.
        teacher: name or folder.
        revision: of it.
        task: how data are read.
        source: where they are.
        classifier: what is trained on top.
        max_length: longest text in tokens.
        has_dev: whether there is a part to tell progress by.
        threads: of torch, for each worker.
    Others are as in `FinetuneConfig`.
    """

    run: str
    teacher: str
    revision: str | None
    task: GlueTask
    source: str
    classifier: ClassifierConfig
    max_length: int
    has_dev: bool
    epochs: int
    lr: float
    batch_size: int
    warmup: float
    weight_decay: float
    clip: float
    dropout: float
    dtype: str
    seed: int
    device: str
    threads: int


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune, or go on with a fine-tuning that was cut off.

    Args:
        config: all settings.

    Returns:
        A summary: `teacher`, its folder; `corpus`, the training texts; `epochs`, the metrics of each; `seconds`.

    Raises:
        BadInput: settings, data or a teacher that do not work.
        MsenseError: training failed; the same command goes on from the last epoch.
    """
    run = RunFolder(lasting(config.output))
    build = BuildConfig(revision=config.revision, max_length=config.max_length)
    info, tokenizer = describe(config.teacher, build)
    joiner = joiner_of(tokenizer) if len(config.data.columns.texts) > 1 else ""
    texts = read_part(config.name, config.data, config.source, TRAIN, joiner)
    classifier = ClassifierConfig(
        task=config.name, dim=info.dim, pooling=_pooling(config, info), labels=_labels(config, texts), joiner=joiner
    )
    dev = _dev_part(config, joiner)
    with locked(run):
        resources = connect(config.workers)
        tuning = _tuning(config, run, info, classifier, resources, has_dev=dev is not None)
        name = _name(config, info, texts, dev, tuning)
        done = storage.read_json(join(run.root, DONE))
        summary = {"teacher": join(run.root, TEACHER), "corpus": join(run.root, CORPUS)}
        _check_folder(config, run, summary["teacher"])
        files = (join(summary["teacher"], "config.json"), summary["corpus"])
        if done and done.get("name") == name and all(map(storage.exists, files)):
            logger.info("the teacher in %s is finished", summary["teacher"])
            return summary | {"epochs": done["epochs"], "seconds": done["seconds"]}
        began = time.monotonic()
        result = fit(name, worker, {"tuning": tuning}, run, resources)
        storage.remove(join(run.root, DONE))  # until here, what another command finished is whole
        _write_corpus(texts, summary["corpus"])
        run_task(keep_teacher, result.checkpoint, summary["teacher"])
        found = {"epochs": result.return_value, "seconds": time.monotonic() - began}
        storage.write_json(join(run.root, DONE), {"name": name, **found})
        storage.remove(join(run.training, name))
    return summary | found


def worker(given: dict[str, Any]) -> list[dict[str, float]]:
    """Do what a worker of Ray Train does; its module is loaded there."""
    from msense.finetune_worker import finetune_worker

    return finetune_worker(given)


def keep_teacher(checkpoint: Any, uri: str) -> None:  # noqa: ANN401 - Ray Train's
    """Copy the teacher out of the last checkpoint; one that is there is replaced."""
    storage.remove(uri)
    with checkpoint.as_directory() as given:
        storage.upload_folder(Path(given, TEACHER), uri)


def _check_folder(config: FinetuneConfig, run: RunFolder, teacher: str) -> None:
    """Refuse to replace the teacher that is read, or a folder that no fine-tuning wrote."""
    if Path(config.teacher).is_dir() and Path(config.teacher).resolve() == Path(teacher).resolve():
        raise BadInput(f"--teacher {config.teacher} is the folder that is written: give another --output")
    if storage.exists(teacher) and not storage.exists(run.training):
        raise BadInput(f"{teacher} is there, but was not written by jobs/finetune.py: give another --output")


def _pooling(config: FinetuneConfig, info: TeacherInfo) -> Pooling:
    """Return how the classifier pools."""
    known: tuple[Pooling, ...] = ("mean", "cls", "lasttoken")
    found = config.pooling or info.pooling
    for pooling in known:
        if found == pooling:
            return pooling
    raise BadInput(f"the teacher pools by {found!r}, which no classifier does: choose with --pooling {'|'.join(known)}")


def _labels(config: FinetuneConfig, texts: Texts) -> tuple[str, ...] | None:
    """Return the labels of the training texts; None for a regression."""
    if config.data.regression:
        return None
    found = tuple(np.unique(texts.labels).tolist())
    if not 2 <= len(found) <= MAX_LABELS or max(map(len, found)) > LONGEST_LABEL:
        raise BadInput(
            f"the training texts of task {config.name} have {len(found)} different labels, but 2 to {MAX_LABELS} of at "
            f"most {LONGEST_LABEL} characters can be told apart: name another column with --label-column, or give --regression "
            "for numbers"
        )
    return found


def _dev_part(config: FinetuneConfig, joiner: str) -> Texts | None:
    """Read the part by which progress is told, if there is one: of a folder `dev` or `validation`."""
    if config.source == config.data.source:  # GLUE's validation part is what is tested on
        return None
    try:
        return read_part(config.name, config.data, config.source, DEV, joiner)
    except BadInput as error:
        logger.info("no part to tell progress by (%s)", error)
        return None


def _tuning(
    config: FinetuneConfig,
    run: RunFolder,
    info: TeacherInfo,
    classifier: ClassifierConfig,
    resources: Resources,
    *,
    has_dev: bool,
) -> Tuning:
    """Return what workers are told."""
    dtype = config.train_dtype
    if dtype == "auto":
        found = run_task(resolve_dtype, "auto", resources.device, device=resources.device)
        dtype = "bfloat16" if found == "bfloat16" else "float32"
    return Tuning(
        run=run.root,
        teacher=storage.absolute(config.teacher) if Path(config.teacher).is_dir() else config.teacher,
        revision=info.revision,
        task=config.data,
        source=config.source if "://" in config.source else storage.absolute(config.source),
        classifier=classifier,
        max_length=info.max_length,
        has_dev=has_dev,
        epochs=config.epochs,
        lr=config.lr,
        batch_size=config.batch_size,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
        dropout=config.dropout,
        dtype=dtype,
        seed=config.seed,
        device=resources.device,
        threads=max(1, (os.cpu_count() or 1) // resources.trainers),
    )


def _name(config: FinetuneConfig, info: TeacherInfo, texts: Texts, dev: Texts | None, tuning: Tuning) -> str:
    """Name a fine-tuning by all that its result depends on."""
    told: dict[str, Any] = config.of_results() | {"dtype": tuning.dtype, "max_length": tuning.max_length}
    told |= {"weights": info.fingerprint, "tokenizer": info.tokenizer_fingerprint, "teacher": "", "prompt": info.prompt}
    told |= {"data": list(texts.fingerprints), "dev": list(dev.fingerprints) if dev else []}
    told |= {"columns": config.data.columns, "metrics": config.data.metrics}  # the parts tested on move nothing
    told["classifier"] = tuning.classifier.model_dump(mode="json")  # the teacher's own pooling too
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=list).encode()).hexdigest()[:16]


def _write_corpus(texts: Texts, uri: str) -> None:
    """Write the training texts as documents; a file that holds them already stays, time and all."""
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts.texts)
    if not storage.exists(uri) or storage.read_text(uri) != content:
        storage.write_text(uri, content)
