"""Distill a student from labels: its losses, and the evaluation on held-out passages.

Every worker derives the global batches from the label manifest and reads its share of each; the engine averages the
gradients. Memory: four times the student, the dictionary's senses (plus up to `sense_losses.MAX_CACHE_BYTES`), one batch
slice, and the teacher for hidden-state losses.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from msense.dictionary import SenseDictionary
from msense.student import Student, StudentSettings, init_student, save_student
from msense.student.pruning import prune_embeddings, restore_embeddings
from msense.student.static import TokenTable
from msense.student.student import StudentOutput
from msense.teacher.model import Teacher
from msense.training.engine import DDPEngine, DeepSpeedEngine, Engine, prepare_process
from msense.training.label_dataset import LabelBatch, LabelSet
from msense.training.loop import ProcessGroup, Session, TrainingLoop, TrainingSettings, run_worker
from msense.training.losses import (
    LossWeights,
    compute_losses,
    frequent_sense_accuracy,
    hard_labels,
    normalized_loss,
    pooled_vectors,
    sense_accuracy,
)
from msense.training.sense_losses import LossSum

STUDENT = "student"  # folder of the last checkpoint


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(TrainingSettings):
    """Settings of a training worker; those without a comment are as in `DistillConfig`."""

    dictionary: str  # folder
    teacher: str  # name or folder
    revision: str | None  # of the teacher
    teacher_dtype: str  # for hidden-state losses
    student: StudentSettings
    mix: LossWeights
    train_embeddings: bool
    batch_tokens: int
    accumulate: int
    deepspeed_stage: int


def train_student(training: DistillationConfig, session: Session) -> list[dict[str, float]]:
    """Train a student as one worker; return the metrics of all epochs."""
    prepare_process(training.threads)
    labels = LabelSet.open(training.run)
    student, given = build_student(training, labels), (training.weight_decay, training.clip)
    if training.deepspeed_stage:
        engine: Engine = DeepSpeedEngine(student, *given, training.deepspeed_stage, training.device)
    else:  # some objectives do not use the sense head
        engine = DDPEngine(student, *given, partial(session.wrap, find_unused_parameters=True, broadcast_buffers=False))
    return run_worker(Trainer(training, engine, labels, ProcessGroup(session.rank, session.world)), session)


def build_student(training: DistillationConfig, labels: LabelSet | None = None) -> Student:
    """Return the untrained student, or raise InputError; without labels only to check the settings.

    Token frequencies in the labels scale the steps of a static student's tokens, and trained embedding tables are reduced
    to the tokens in the labels.
    """
    dictionary = SenseDictionary.load(training.dictionary)
    trained, held_out = (None, None) if labels is None else labels.token_counts()
    student = init_student(training.student, dictionary, training.teacher, training.revision, trained)
    student = student.to(training.device)
    if not isinstance(student.body, TokenTable) and not training.train_embeddings:
        student.body.get_input_embeddings().requires_grad_(False)
    elif trained is not None:
        prune_embeddings(student, torch.from_numpy(np.flatnonzero(trained + held_out)))
    return student


class Trainer(TrainingLoop):
    """Distillation of one worker.

    Example:
        >>> labels = LabelSet.open(training.run)
        >>> trainer = Trainer(training, DDPEngine(build_student(training, labels), 0.01, clip=1.0), labels)
        >>> for state in trainer.run():
        ...     trainer.save(Path("checkpoint"))
    """

    def __init__(
        self, training: DistillationConfig, engine: Engine, labels: LabelSet, group: ProcessGroup | None = None
    ) -> None:
        """Load the dictionary, and the teacher if a hidden-state loss needs it."""
        super().__init__(training, engine, group, tuple(training.mix.weights()))
        self.training, self.labels, self.student = training, labels, engine.student
        self.dictionary = SenseDictionary.load(training.dictionary).to(training.device)
        self.space = training.mix.space(self.dictionary)
        self.teacher: Teacher | None = None
        if training.mix.mse or training.mix.cosine:
            where: dict[str, Any] = {"device": training.device, "threads": training.threads}
            where |= {"layer": self.dictionary.config.layer, "attention": self.dictionary.config.attention}
            self.teacher = Teacher(training.teacher, revision=training.revision, dtype=training.teacher_dtype, **where)

    def batches(self, epoch: int) -> Iterator[np.ndarray]:
        """Yield the passages of each step."""
        return self.labels.batches(epoch, self.training.seed, self.training.batch_tokens)

    def count_tokens(self, batch: np.ndarray) -> int:
        """Return the number of tokens of passages."""
        return int(self.labels.lengths[batch].sum())

    def backward(self, batch: np.ndarray, report: bool) -> dict[str, float]:
        """Accumulate gradients; return mean losses and, if requested, this worker's sense accuracy, if the batch has them."""
        training, group = self.training, self.group
        share = batch[group.rank :: group.world]
        slices = [some for some in np.array_split(share, training.accumulate) if len(some)]
        # a worker without passages takes part in the collective operations with a zero loss
        read = [self.labels.read(some) for some in slices] or [self.labels.read(batch[:1])]
        own = [_counts(training.mix, some) for some in read] if slices else []
        names = list(training.mix.weights())
        counted = group.sum([sum(count[name] for count in own) for name in names], training.device)
        counts = {name: int(count) for name, count in zip(names, counted, strict=True)}
        totals, right = dict.fromkeys(names, 0.0), []
        for number, some in enumerate(read):
            with self.engine.slice_of_step(last=number == len(read) - 1):
                output, sums = self._losses(some, self.engine.model)
                loss = normalized_loss(training.mix, sums, counts, group.world)
                self.engine.backward(loss if slices else loss * 0)
            for name, part in sums.items() if slices else ():
                totals[name] += float(part.total.detach())
            if report:
                right.append(self._accuracy(output, some))
        every = group.sum(list(totals.values()), training.device)
        losses = {name: total / counts[name] for name, total in zip(names, every, strict=True) if counts[name]}
        if report and (tokens := sum(part.count for part in right)):
            losses["accuracy"] = float(sum(part.total for part in right)) / tokens
        return losses

    def _losses(self, batch: LabelBatch, model: nn.Module) -> tuple[StudentOutput, dict[str, LossSum]]:
        """Return the student's output for a batch, and its losses."""
        training, device = self.training, self.training.device
        mask, rows = batch.mask.to(device), batch.without_spans()[0]
        rows = None if len(rows) == len(mask) else rows.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=training.dtype == "bfloat16"):
            output = StudentOutput(*(part.float() for part in model(batch.ids.to(device), mask, rows)))
        hidden = None
        if self.teacher is not None:
            hidden = self.teacher.embed(batch.ids.numpy(), batch.mask.numpy())[mask].float()
        return output, compute_losses(training.mix, output, batch, self.space, self.student.sentence, hidden)

    def _accuracy(self, output: StudentOutput, batch: LabelBatch) -> LossSum:
        """Return the sense accuracy on the texts that are no spans."""
        batch = batch.without_spans()[1]
        ids, labels = batch.ids.flatten().numpy(), hard_labels(batch)
        return sense_accuracy(output.senses.flatten(0, 1), ids, labels, self.dictionary, self.space.metric)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return losses, sense accuracy, its baseline and the pooled cosine on the held-out passages."""
        self.engine.model.eval()
        training, labels, group = self.training, self.labels, self.group
        passages = labels.held_out()
        own = passages[np.argsort(labels.lengths[passages], kind="stable")][group.rank :: group.world]
        names = [*training.mix.weights(), "accuracy", "frequent", "pooled_cosine"]
        totals, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        size = max(1, training.batch_tokens // int(labels.lengths[own].max(initial=1)))
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
        output, metrics = self._losses(batch, self.student)
        metrics["accuracy"] = self._accuracy(output, batch)
        whole = batch.without_spans()[1]
        metrics["frequent"] = frequent_sense_accuracy(whole.ids.flatten().numpy(), hard_labels(whole), self.dictionary)
        if batch.pooled is not None:
            vectors = pooled_vectors(output.hidden, batch, self.student.sentence)
            cosine = nn.functional.cosine_similarity(vectors, batch.pooled.to(vectors.device)).sum()
            metrics["pooled_cosine"] = LossSum(cosine, len(vectors))
        return metrics

    def export(self, folder: Path) -> None:
        """Write the student, with its whole embedding table."""
        restore_embeddings(self.student)
        save_student(folder / STUDENT, self.student)


def _counts(mix: LossWeights, batch: LabelBatch) -> dict[str, int]:
    """Return what each loss of a batch averages over: the number of labelled tokens, of passages, or of tokens."""
    whole = batch.without_spans()[1]
    kinds = {"sense": int((whole.senses >= 0).sum()), "pooled": len(batch.ids), "replaced": len(whole.ids)}
    return {name: kinds.get(name, int(batch.mask.sum())) for name in mix.weights()}
