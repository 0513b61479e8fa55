"""Stage 7: train a student on the labels with Ray Train, and write its folder.

Runs on the driver, which holds settings and metrics only. Each training has a folder named after its settings, so that
one set of labels serves several trainings, and an interrupted training resumes from its last checkpoint.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msense import storage
from msense.dictionary import SenseDictionary
from msense.distill_config import DistillConfig
from msense.label_set import LabelSet
from msense.label_source import Source
from msense.losses import Mix
from msense.ray_train import fit
from msense.run_folder import RunFolder
from msense.runtime import Resources, run_task
from msense.scratch import scratch_folder
from msense.storage import join
from msense.student import StudentSettings, load_student, ship
from msense.student.shipping import ShippedSenses
from msense.teacher import resolve_dtype
from msense.train_loop import Training, new_student

logger = logging.getLogger(__name__)

TOLD = ("sense", "pooled", "accuracy", "frequent", "pooled_cosine")  # held-out metrics in the summary


def try_student(training: Training) -> None:
    """Raise BadInput if the student cannot be built; called before any labels are generated."""
    new_student(training)


def training_of(config: DistillConfig, source: Source, run: RunFolder, resources: Resources, dtype: str) -> Training:
    """Return the workers' settings; `dtype` is the teacher's."""
    student_dtype = config.student_dtype
    if student_dtype == "auto":
        resolved = run_task(resolve_dtype, "auto", resources.device, device=resources.device)
        student_dtype = "bfloat16" if resolved == "bfloat16" else "float32"
    weights: dict[str, Any] = dict(config.objective)
    return Training(
        run=run.root,
        dictionary=source.dictionary,
        teacher=source.teacher,
        revision=source.info.revision,
        teacher_dtype=dtype,
        student=StudentSettings(kind=config.student, heads=config.heads, seed=config.seed),
        mix=Mix(metric=config.metric, temperature=None if config.reference else config.temperature, **weights),
        train_embeddings=config.train_embeddings,
        epochs=config.epochs,
        batch_tokens=config.batch_tokens,
        accumulate=config.accumulate,
        lr=config.highest_rate,
        schedule=config.schedule,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
        dtype=student_dtype,
        seed=config.seed,
        deepspeed_stage=config.deepspeed_stage,
        checkpoint_steps=config.checkpoint_steps,
        device=resources.device,
        threads=max(1, (os.cpu_count() or 1) // resources.trainers),
    )


def worker(given: dict[str, Any]) -> list[dict[str, float]]:
    """Run `train_worker`, which is imported in the worker process only."""
    from msense.train_worker import train_worker

    return train_worker(given)


def train(
    config: DistillConfig, training: Training, run: RunFolder, resources: Resources, labels: LabelSet
) -> dict[str, Any]:
    """Train a student or resume an interrupted training, unless it is finished; return its last metrics.

    Raises:
        MsenseError: workers failed repeatedly; names the cause.
    """
    name = _name(training, labels)
    history = storage.read_json(join(run.student, "training.json"))
    if history and history.get("name") == name:
        logger.info("the student in %s is finished", run.student)
        return _stats(history["epochs"])
    result = fit(name, worker, {"training": training}, run, resources)
    epochs: list[dict[str, float]] = result.return_value
    run_task(ship_student, result.checkpoint, training, run.student, config.ship_senses, epochs[-1])
    storage.write_json(join(run.student, "training.json"), {"name": name, "epochs": epochs})
    storage.remove(join(run.training, name))
    return _stats(epochs)


def ship_student(
    checkpoint: Any,  # noqa: ANN401 - Ray Train's
    training: Training,
    uri: str,
    senses: ShippedSenses,
    metrics: dict[str, float],
) -> None:
    """Write the self-contained folder of the student in a checkpoint to `uri`; the model card shows `metrics`."""
    from msense.train_worker import STUDENT

    dictionary = SenseDictionary.load(training.dictionary)
    if training.mix.metric is not None:
        dictionary.config = dictionary.config.model_copy(update={"metric": training.mix.metric})
    figures = {name.replace("_", " "): value for name, value in metrics.items() if name.startswith("held_out")}
    with checkpoint.as_directory() as given, scratch_folder() as scratch:
        ship(scratch, load_student(Path(given, STUDENT)), dictionary, senses=senses, figures=figures)
        storage.upload_folder(scratch, uri)


def _name(training: Training, labels: LabelSet) -> str:
    """Return a hash of everything that the result of a training depends on."""
    settings = asdict(training) | {"run": labels.manifest.made_of, "dictionary": labels.manifest.dictionary}
    for name in ("threads", "teacher", "device", "checkpoint_steps"):
        settings.pop(name)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _stats(epochs: list[dict[str, float]]) -> dict[str, Any]:
    """Return the summary of a finished training."""
    last = epochs[-1]
    held_out = {f"held out {name}": round(last[f"held_out_{name}"], 4) for name in TOLD if f"held_out_{name}" in last}
    return {"epochs": len(epochs), "steps": int(last["step"]), **held_out}
