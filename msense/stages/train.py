"""Stage 7: train a student on the labels, and write its folder.

Each training has a folder named after its settings, so that one set of labels serves several trainings.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from msense.dictionary import SenseDictionary
from msense.io import storage
from msense.io.scratch import scratch_folder
from msense.io.storage import join
from msense.run.folder import RunFolder
from msense.run.progress import display_progress
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import Stage, StageContext
from msense.student import load_student, save_pretrained
from msense.student.files import WeightDtype
from msense.student.shipping import StoredSenses
from msense.training.distiller import STUDENT, DistillationConfig, build_student, train_student
from msense.training.label_dataset import LabelSet

logger = logging.getLogger(__name__)
REPORTED = ("sense", "pooled", "accuracy", "frequent", "pooled_cosine")  # held-out metrics in the summary


def check_student(training: DistillationConfig) -> None:
    """Raise InputError if the student cannot be built."""
    build_student(training)


@dataclass(frozen=True)
class TrainStats:
    """The outcome of a training."""

    epochs: int
    steps: int
    held_out: dict[str, float]  # metrics of the last epoch


class TrainStage(Stage[TrainStats]):
    """Trains a student, resumes an interrupted training, or keeps the student of a finished one."""

    name = "training"

    def __init__(
        self,
        run: RunFolder,
        training: DistillationConfig,
        labels: LabelSet,
        senses: StoredSenses,
        dtype: WeightDtype = "float32",
    ) -> None:
        """Train on `labels`; ship the student's dictionary as `senses` says, and its weights as `dtype`."""
        super().__init__(run, [join(run.student, "training.json")])  # metrics of all epochs, written after the student
        self.training, self.senses, self.dtype = training, senses, dtype
        self.training_name = _name(training, labels)

    def finished(self, context: StageContext) -> list[Row | None]:
        """Return the metrics of a finished training with the same settings."""
        history = storage.read_json(self.outputs[0])
        if not history or history.get("name") != self.training_name:
            return [None]
        logger.info("the student in %s is finished", self.run.student)
        return [history]

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Train and write the student's folder; raise MsenseError if workers failed repeatedly."""
        with display_progress(self.run):
            result = executor.train(self.training_name, train_student, self.training, self.run.training)
        epochs = result.history
        stored = (self.senses, self.dtype)
        executor.run(save_student_folder, result.checkpoint, self.training, self.run.student, stored, epochs[-1])
        storage.write_json(self.outputs[0], {"name": self.training_name, "epochs": epochs})
        storage.remove(join(self.run.training, self.training_name))
        yield {"number": 0, "epochs": epochs}

    def reduce(self, executor: Executor, stats: list[Row]) -> TrainStats:
        """Return the metrics of the last epoch."""
        *_, last = epochs = stats[0]["epochs"]
        held_out = {name: round(last[f"held_out_{name}"], 4) for name in REPORTED if f"held_out_{name}" in last}
        return TrainStats(len(epochs), int(last["step"]), held_out)


def save_student_folder(
    checkpoint: str,
    training: DistillationConfig,
    uri: str,
    stored: tuple[StoredSenses, WeightDtype],
    metrics: dict[str, float],
) -> None:
    """Write the self-contained folder of the student in a checkpoint to `uri`; the model card shows `metrics`."""
    senses, dtype = stored
    dictionary = SenseDictionary.load(training.dictionary)
    if training.mix.metric is not None:
        dictionary.config = dictionary.config.model_copy(update={"metric": training.mix.metric})
    figures = {name.replace("_", " "): value for name, value in metrics.items() if name.startswith("held_out")}
    with storage.local_folder(checkpoint) as given, scratch_folder() as scratch:
        save_pretrained(scratch, load_student(given / STUDENT), dictionary, senses=senses, dtype=dtype, figures=figures)
        storage.upload_folder(scratch, uri)


def _name(training: DistillationConfig, labels: LabelSet) -> str:
    """Return a hash of everything that the result of a training depends on."""
    settings = asdict(training) | {"run": labels.manifest.inputs_hash, "dictionary": labels.manifest.dictionary}
    for name in ("threads", "teacher", "device", "checkpoint_steps"):
        settings.pop(name)
    if settings["student"]["pooling"] == "auto":  # as in versions without it
        del settings["student"]["pooling"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
