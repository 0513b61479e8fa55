"""Training loop of one distillation worker: labels and a student in, a trained student and checkpoints out.

Every worker derives the global batches from the label manifest and reads its share of each; `train_engine` averages
the gradients. The random state of a step depends on (seed, epoch, step, rank) only. Never imports Ray. Memory: four
times the student, the dictionary's senses (plus up to `sense_losses.KEPT_BYTES`), one batch slice, and the teacher for
hidden-state losses.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from msense.constants import NO_SENSE
from msense.dictionary import SenseDictionary
from msense.errors import InputError, MsenseError
from msense.io import storage
from msense.run.progress import Progress
from msense.student import Student, StudentSettings, init_student
from msense.student.pruning import prune_embeddings
from msense.student.static import StaticBody
from msense.student.student import StudentOutput
from msense.teacher.model import Teacher
from msense.training.engine import Engine, checkpoint_error
from msense.training.group import ProcessGroup
from msense.training.label_dataset import LabelBatch, LabelSet
from msense.training.losses import (
    LabeledBatch,
    LossWeights,
    combine_losses,
    compute_losses,
    frequent_sense_accuracy,
    sense_accuracy,
)
from msense.training.schedule import lr_factor
from msense.training.sense_losses import LossSum, SenseLabels

STATE_FILE = "state.json"  # of a checkpoint


@dataclass(frozen=True)
class DistillationConfig:
    """Settings of a training worker; those without a comment are as in `DistillConfig`."""

    run: str  # run folder with the labels
    dictionary: str  # folder
    teacher: str  # name or folder
    revision: str | None  # of the teacher
    teacher_dtype: str  # for hidden-state losses
    student: StudentSettings
    mix: LossWeights
    train_embeddings: bool
    epochs: int
    batch_tokens: int
    accumulate: int
    lr: float
    schedule: str
    warmup: float
    weight_decay: float
    clip: float
    dtype: str
    seed: int
    deepspeed_stage: int
    checkpoint_steps: int
    device: str
    threads: int  # torch threads per worker


@dataclass
class TrainState:
    """Progress of a training; a checkpoint stores it as JSON."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the current epoch
    tokens: int = 0  # read by these steps
    seconds: float = 0.0  # taken by these steps
    sums: dict[str, float] = field(default_factory=dict)  # losses of these steps, by name
    history: list[dict[str, float]] = field(default_factory=list)  # metrics of each finished epoch


def build_student(training: DistillationConfig, labels: LabelSet | None = None) -> Student:
    """Return the untrained student.

    Args:
        training: settings.
        labels: token frequencies scale the steps of a static student's tokens, and trained embedding tables are
            reduced to the tokens in the labels. None: build the student only to check the settings.

    Raises:
        InputError: the student cannot be built.
    """
    dictionary = SenseDictionary.load(training.dictionary)
    trained, held_out = (None, None) if labels is None else labels.token_counts()
    student = init_student(training.student, dictionary, training.teacher, training.revision, trained)
    student = student.to(training.device)
    if not isinstance(student.body, StaticBody) and not training.train_embeddings:
        student.body.model.get_input_embeddings().requires_grad_(False)
    elif trained is not None:
        prune_embeddings(student, torch.from_numpy(np.flatnonzero(trained + held_out)))
    return student


class Trainer:
    """Training loop of one worker.

    Example:
        labels = LabelSet.open(training.run)
        student = new_student(training, labels)
        trainer = Trainer(training, Plain(student, training.weight_decay, training.clip), labels)
        for state in trainer.run():
            trainer.save(Path("checkpoint"))
    """

    def __init__(
        self, training: DistillationConfig, engine: Engine, labels: LabelSet, group: ProcessGroup | None = None
    ) -> None:
        """Load the dictionary, and the teacher if a hidden-state loss needs it."""
        self.training, self.engine, self.labels = training, engine, labels
        self.group, self.state = group or ProcessGroup(), TrainState()
        self.student = engine.student
        self.dictionary = SenseDictionary.load(training.dictionary).to(training.device)
        self.space = training.mix.space(self.dictionary)
        self.teacher: Teacher | None = None
        if training.mix.mse or training.mix.cosine:
            self.teacher = Teacher(
                training.teacher,
                revision=training.revision,
                layer=self.dictionary.config.layer,
                dtype=training.teacher_dtype,
                device=training.device,
                threads=training.threads,
            )

    @property
    def history(self) -> list[dict[str, float]]:
        """The metrics of every finished epoch."""
        return self.state.history

    def run(self, progress: Progress | None = None) -> Iterator[TrainState]:
        """Train from the current state on; yield it whenever a checkpoint is due, which includes the end of each epoch.

        Raises:
            MsenseError: a loss or gradient is NaN or infinite.
        """
        training, state = self.training, self.state
        order = (training.seed, training.batch_tokens)
        lengths = [self.labels.steps(epoch, *order) for epoch in range(training.epochs)]
        for epoch in range(state.epoch, training.epochs):
            self.engine.model.train()
            for passages in self.labels.batches(epoch, *order, first_step=state.step):
                self._next_step(passages, sum(lengths[:epoch]) + state.step, sum(lengths), progress)
                if state.step % training.checkpoint_steps == 0 and state.step < lengths[epoch]:
                    yield state
            metrics = {f"train_{name}": total / max(1, lengths[epoch]) for name, total in state.sums.items()}
            metrics |= {"epoch": epoch + 1, "step": sum(lengths[: epoch + 1])}
            metrics |= {"tokens_per_s": state.tokens / max(state.seconds, 1e-9)}
            metrics |= self.evaluate()
            state.history.append(metrics)
            state.epoch, state.step, state.tokens, state.seconds, state.sums = epoch + 1, 0, 0, 0.0, {}
            if progress is not None:
                progress.epoch(state.history)
            yield state

    def _next_step(self, passages: np.ndarray, done: int, steps: int, progress: Progress | None) -> None:
        """Take step number `done` of `steps`, update the state and report progress if that is due."""
        training, state = self.training, self.state
        began = time.monotonic()
        numbers = (training.seed, state.epoch, state.step, self.group.rank)
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
        is_due = progress is not None and progress.is_due()
        lr = training.lr * lr_factor(done, steps, training.warmup, training.schedule)
        losses = self._step(passages, lr, is_due)
        state.step += 1
        state.tokens += int(self.labels.lengths[passages].sum())
        state.seconds += time.monotonic() - began
        for name in training.mix.weights():
            state.sums[name] = state.sums.get(name, 0.0) + losses[name]
        if progress is not None and is_due:
            left = (steps - done - 1) * state.seconds / state.step
            speed = {"tokens_per_s": state.tokens / state.seconds, "seconds_left": left}
            progress.tell(done + 1, steps, state.epoch + 1, losses, speed)

    def _step(self, passages: np.ndarray, lr: float, with_accuracy: bool) -> dict[str, float]:
        """Take one step; return the global batch's mean losses and, if requested, this worker's sense accuracy."""
        training, group = self.training, self.group
        share = passages[group.rank :: group.world]
        slices = [part for part in np.array_split(share, training.accumulate) if len(part)]
        # a worker without passages takes part in the collective operations with a zero loss
        batches = [self.labels.read(part) for part in slices] or [self.labels.read(passages[:1])]
        own = [_counts(training.mix, batch) for batch in batches] if slices else []
        names = list(training.mix.weights())
        counted = group.sum([sum(c[n] for c in own) for n in names], training.device)
        counts = {name: int(count) for name, count in zip(names, counted, strict=True)}
        totals, right = dict.fromkeys(names, 0.0), []
        for number, batch in enumerate(batches):
            with self.engine.slice_of_step(last=number == len(batches) - 1):
                output, labelled = self._forward(batch, self.engine.model)
                sums = compute_losses(training.mix, output, labelled, self.space, self.student.sentence)
                loss = combine_losses(training.mix, sums, counts, group.world)
                self.engine.backward(loss if slices else loss * 0)
            for name, part in sums.items() if slices else ():
                totals[name] += float(part.total.detach())
            if with_accuracy:
                right.append(self._accuracy(output, batch))
        every = group.sum(list(totals.values()), training.device)
        losses = {name: total / max(1, counts[name]) for name, total in zip(names, every, strict=True)}
        if not all(map(math.isfinite, losses.values())):
            values = ", ".join(f"{name} {value}" for name, value in losses.items())
            raise MsenseError(f"the loss is not finite ({values}): use a smaller --lr, or --student-dtype float32")
        self.engine.step(lr)
        if with_accuracy:
            losses["accuracy"] = float(sum(part.total for part in right)) / max(1, sum(part.count for part in right))
        return losses

    def _forward(self, batch: LabelBatch, model: nn.Module) -> tuple[StudentOutput, LabeledBatch]:
        """Return the student's output for a batch, and the labels to compare it with."""
        device = self.training.device
        mask = batch.mask.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=self.training.dtype == "bfloat16"):
            output = model(batch.ids.to(device), mask)
        hidden = None
        if self.teacher is not None:
            hidden = self.teacher.embed(batch.ids.numpy(), batch.mask.numpy())[mask].float()
        return StudentOutput(output[0].float(), output[1].float()), _labelled(batch, mask, hidden)

    def _accuracy(self, output: StudentOutput, batch: LabelBatch) -> LossSum:
        return sense_accuracy(output.senses.flatten(0, 1), *_hard_labels(batch), self.dictionary, self.space.metric)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return losses, sense accuracy, its baseline and the pooled cosine on the held-out passages."""
        self.engine.model.eval()
        training, labels, group = self.training, self.labels, self.group
        passages = labels.held_out()
        own = passages[np.argsort(labels.lengths[passages], kind="stable")][group.rank :: group.world]
        names = [*training.mix.weights(), "accuracy", "frequent", "pooled_cosine"]
        totals, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        longest = max(1, int(labels.lengths[own].max(initial=1)))
        size = max(1, training.batch_tokens // longest)
        with self.engine.whole():
            for start in range(0, len(own), size):
                for name, part in self._metrics(labels.read(own[start : start + size])).items():
                    totals[name] += float(part.total)
                    counts[name] += part.count
        summed = group.sum([*totals.values(), *counts.values()], training.device)
        pairs = zip(names, summed[: len(names)], summed[len(names) :], strict=True)
        return {f"held_out_{name}": total / count for name, total, count in pairs if count}

    def _metrics(self, batch: LabelBatch) -> dict[str, LossSum]:
        """Return the losses and held-out metrics of a batch."""
        output, labelled = self._forward(batch, self.student)
        metrics = compute_losses(self.training.mix, output, labelled, self.space, self.student.sentence)
        metrics["accuracy"] = self._accuracy(output, batch)
        metrics["frequent"] = frequent_sense_accuracy(*_hard_labels(batch), self.dictionary)
        if labelled.sentences is not None:
            vectors = self.student.sentence(output.hidden, labelled.mask)
            cosine = nn.functional.cosine_similarity(vectors, labelled.sentences).sum()
            metrics["pooled_cosine"] = LossSum(cosine, len(vectors))
        return metrics

    def save(self, folder: Path) -> None:
        """Write a checkpoint; its JSON file is written last."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.group.rank == 0 or self.engine.every_rank:
            self.engine.save(folder)
        if self.group.rank == 0:
            storage.write_json(str(folder / STATE_FILE), asdict(self.state) | {"workers": self.group.world})

    def restore(self, folder: Path) -> None:
        """Load a checkpoint; raise InputError if it is corrupted or sharded over another number of workers."""
        try:
            stored = storage.read_json(str(folder / STATE_FILE))
            if stored is None:
                raise ValueError(f"{STATE_FILE} is missing or fails its checksum")
            epoch, step, tokens, workers = (int(stored[name]) for name in ("epoch", "step", "tokens", "workers"))
            self.state = TrainState(
                epoch, step, tokens, float(stored["seconds"]), dict(stored["sums"]), list(stored["history"])
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise checkpoint_error(folder, error) from error
        if self.engine.every_rank and workers != self.group.world:
            raise InputError(
                f"the checkpoint {folder} was written by {workers} workers, and DeepSpeed resumes only with as many: "
                f"use --workers {workers}, or delete the checkpoint"
            )
        self.engine.load(folder)


def _counts(mix: LossWeights, batch: LabelBatch) -> dict[str, int]:
    """Return what each loss of a batch averages over: the number of labelled tokens, of passages, or of tokens."""
    labelled = int((batch.senses >= 0).sum())
    kinds = {"sense": labelled, "pooled": len(batch.ids), "replaced": len(batch.ids)}
    return {name: kinds.get(name, int(batch.mask.sum())) for name in mix.weights()}


def _labelled(batch: LabelBatch, mask: Tensor, hidden: Tensor | None) -> LabeledBatch:
    """Return the labels of a batch in the form of `losses`."""
    if batch.soft_senses is None or batch.soft_weights is None:
        senses = SenseLabels(_numbers(batch.senses.flatten()))
    else:
        senses = SenseLabels(_numbers(batch.soft_senses.flatten(0, 1)), batch.soft_weights.flatten(0, 1).numpy())
    sentences = None if batch.pooled is None else batch.pooled.to(mask.device)
    return LabeledBatch(batch.ids, mask, senses, sentences, hidden)


def _hard_labels(batch: LabelBatch) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and the teacher's senses of all positions [B·L]; padding has no sense."""
    return batch.ids.flatten().numpy(), _numbers(batch.senses.flatten())


def _numbers(senses: Tensor) -> np.ndarray:
    """Return sense numbers as the labels store them, uint16; -1 (none) becomes 65535."""
    return np.asarray(senses.masked_fill(senses < 0, NO_SENSE).numpy().astype(np.uint16))
