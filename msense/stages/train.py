"""Stage 7: train a student on the labels with Ray Train, and write its folder.

Runs on the driver, which holds settings and metrics only. Each training has a folder named after its settings, so that
one set of labels serves several trainings, and an interrupted training resumes from its last checkpoint.
"""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msense.config.distill import DistillConfig
from msense.dictionary import SenseDictionary
from msense.io import storage
from msense.io.scratch import scratch_folder
from msense.io.storage import join
from msense.run.folder import RunFolder
from msense.runtime.ray_executor import run_task
from msense.runtime.resources import Resources
from msense.stages.ray_train import run_training
from msense.student import load_student, save_pretrained
from msense.student.shipping import StoredSenses
from msense.training.distiller import DistillationConfig, build_student
from msense.training.label_dataset import LabelSet

logger = logging.getLogger(__name__)
SUMMARY_METRICS = ("sense", "pooled", "accuracy", "frequent", "pooled_cosine")  # held-out metrics in the summary


def check_student(training: DistillationConfig) -> None:
    """Raise BadInput if the student cannot be built; called before any labels are generated."""
    build_student(training)


def worker(given: dict[str, Any]) -> list[dict[str, float]]:
    """Run `train_worker`, which is imported in the worker process only."""
    from msense.stages.train_worker import train_worker

    return train_worker(given)


def train(
    config: DistillConfig, training: DistillationConfig, run: RunFolder, resources: Resources, labels: LabelSet
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
    result = run_training(name, worker, {"training": training}, run, resources)
    epochs: list[dict[str, float]] = result.return_value
    run_task(save_student_folder, result.checkpoint, training, run.student, config.ship_senses, epochs[-1])
    storage.write_json(join(run.student, "training.json"), {"name": name, "epochs": epochs})
    storage.remove(join(run.training, name))
    return _stats(epochs)


def save_student_folder(
    checkpoint: Any,  # noqa: ANN401 - Ray Train's
    training: DistillationConfig,
    uri: str,
    senses: StoredSenses,
    metrics: dict[str, float],
) -> None:
    """Write the self-contained folder of the student in a checkpoint to `uri`; the model card shows `metrics`."""
    from msense.stages.train_worker import STUDENT

    dictionary = SenseDictionary.load(training.dictionary)
    if training.mix.metric is not None:
        dictionary.config = dictionary.config.model_copy(update={"metric": training.mix.metric})
    figures = {name.replace("_", " "): value for name, value in metrics.items() if name.startswith("held_out")}
    with checkpoint.as_directory() as given, scratch_folder() as scratch:
        save_pretrained(scratch, load_student(Path(given, STUDENT)), dictionary, senses=senses, figures=figures)
        storage.upload_folder(scratch, uri)


def _name(training: DistillationConfig, labels: LabelSet) -> str:
    """Return a hash of everything that the result of a training depends on."""
    settings = asdict(training) | {"run": labels.manifest.inputs_hash, "dictionary": labels.manifest.dictionary}
    for name in ("threads", "teacher", "device", "checkpoint_steps"):
        settings.pop(name)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _stats(epochs: list[dict[str, float]]) -> dict[str, Any]:
    """Return the summary of a finished training."""
    last = epochs[-1]
    held_out = {
        f"held out {name}": round(last[f"held_out_{name}"], 4) for name in SUMMARY_METRICS if f"held_out_{name}" in last
    }
    return {"epochs": len(epochs), "steps": int(last["step"]), **held_out}
