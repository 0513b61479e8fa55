"""A Ray Train worker that fine-tunes a teacher with a classifier and reports a checkpoint after every epoch.

Memory: four times the teacher (weights, gradients, optimizer), the texts as token ids, and one batch.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from msense.config.finetune import FinetuneConfig
from msense.corpus.glue import DEV, TRAIN, read_split
from msense.errors import MsenseError
from msense.metrics import METRICS
from msense.run.progress import Progress
from msense.student.tokenizer import pad_ids
from msense.student.transformer import TransformerBody, body_settings, load_weights
from msense.teacher.batching import token_batches
from msense.teacher.body import load_body
from msense.teacher.classifier import Classifier, ClassifierConfig
from msense.teacher.files import body_folder, locate
from msense.teacher.finetuned import save_teacher
from msense.teacher.spec import TeacherOptions, load_teacher_info
from msense.training.distiller import STATE_FILE
from msense.training.engine import DDPEngine, checkpoint_error
from msense.training.group import ProcessGroup
from msense.training.schedule import lr_factor

BUCKET = 50  # batches sorted by length together: enough for little padding, few enough that batches vary
TEACHER = "teacher"  # folder in the last checkpoint and in the run folder


@dataclass(frozen=True)
class FinetuningConfig:
    """The settings of a worker.

    Attributes:
        config: with absolute paths, the teacher's commit, and the dtype that `auto` stands for.
        run: run folder, for progress.
        max_length: longest text in tokens.
        has_dev: whether there is a dev split to evaluate after every epoch.
        threads: torch threads per worker.
    """

    config: FinetuneConfig
    run: str
    classifier: ClassifierConfig
    max_length: int
    has_dev: bool
    device: str
    threads: int


class TeacherWithClassifier(nn.Module):
    """A teacher's body, computing as `Teacher.embed` does, with a classifier."""

    def __init__(self, tuning: FinetuningConfig) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            config = tuning.config
            torch.manual_seed(config.seed)
            model = load_body(body_folder(config.teacher, config.revision), config.teacher, torch.float32)
            self.body = TransformerBody(body_settings(model))
            load_weights(self.body, model)
            self.classifier = Classifier(tuning.classifier, config.dropout)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return scores [B, labels] of token ids int64 [B, L] where the mask is true."""
        scores: Tensor = self.classifier(self.body(ids, mask), mask)
        return scores


@dataclass(frozen=True)
class TokenizedSplit:
    """A tokenized split of the data.

    Attributes:
        rows: token ids of each text.
        targets: label indices, int64 [P] (-100 for an unknown label), or float32 [P].
        gold: the labels themselves.
    """

    rows: list[np.ndarray]
    targets: Tensor
    gold: np.ndarray


class Finetuner:
    """The training loop of one worker.

    Example:
        >>> tuner = Tuner(tuning, Group())  # one process, without Ray
        >>> metrics = list(tuner.run())
        >>> tuner.save_teacher(Path("teacher"))
    """

    def __init__(self, tuning: FinetuningConfig, group: ProcessGroup, wrap: Any = None) -> None:
        self.tuning, self.config, self.group = tuning, tuning.config, group
        self.model = TeacherWithClassifier(tuning).to(tuning.device)
        self.engine = DDPEngine(self.model, self.config.weight_decay, self.config.clip, wrap)
        self.train_part = _read(tuning, TRAIN)
        self.dev_part = _read(tuning, DEV) if tuning.has_dev and group.rank == 0 else None
        self.history: list[dict[str, float]] = []

    def run(self, progress: Progress | None = None) -> Iterator[dict[str, float]]:
        """Train the remaining epochs; yield the metrics of each.

        Raises:
            MsenseError: a loss or gradient is NaN or infinite.
        """
        config, rows = self.config, self.train_part.rows
        steps = math.ceil(len(rows) / config.batch_size)
        total = steps * config.epochs
        for epoch in range(len(self.history), config.epochs):
            self.engine.model.train()
            began, losses, tokens = time.monotonic(), 0.0, 0
            for step, batch in enumerate(batches(rows, config.batch_size, (config.seed, epoch))):
                seed = np.random.SeedSequence((config.seed, epoch, step, self.group.rank)).generate_state(1)
                torch.manual_seed(int(seed[0]))
                done = epoch * steps + step
                losses += self._step(batch, config.lr * lr_factor(done, total, config.warmup, "linear"))
                tokens += sum(len(rows[i]) for i in batch)
                if progress is not None and progress.is_due():
                    seconds = time.monotonic() - began
                    left = (total - done - 1) * seconds / (step + 1)
                    speed = {"tokens_per_s": tokens / seconds, "seconds_left": left}
                    progress.tell(done + 1, total, epoch + 1, {"loss": losses / (step + 1)}, speed)
            metrics = {"epoch": epoch + 1, "step": (epoch + 1) * steps, "train_loss": losses / steps, **self.evaluate()}
            self.history.append(metrics)
            if progress is not None:
                progress.epoch(self.history)
            yield metrics

    def _step(self, batch: np.ndarray, lr: float) -> float:
        """Run one step on a global batch; return its mean loss."""
        group, part, device = self.group, self.train_part, self.tuning.device
        own = batch[group.rank :: group.world]
        rows = own if len(own) else batch[:1]  # all workers must take part in the reduction
        ids, mask = (tensor.to(device) for tensor in pad_ids([part.rows[i] for i in rows]))
        with torch.autocast(device, torch.bfloat16, enabled=self.config.train_dtype == "bfloat16"):
            scores = self.engine.model(ids, mask).float()
        targets = part.targets[torch.from_numpy(rows)].to(device)
        if self.config.data.regression:
            loss = mse_loss(scores[:, 0], targets, reduction="sum")
        else:
            loss = cross_entropy(scores, targets, reduction="sum")
        loss = loss if len(own) else loss * 0
        self.engine.backward(loss * group.world / len(batch))  # gradients are averaged over workers
        mean = group.sum([float(loss.detach())], device)[0] / len(batch)
        if not math.isfinite(mean):
            raise MsenseError(f"the loss is not finite ({mean}): give a smaller --lr, or --train-dtype float32")
        self.engine.step(lr)
        return mean

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the task's metrics on the dev split; empty on workers without one."""
        if self.dev_part is None:
            return {}
        self.engine.model.eval()
        part, labels = self.dev_part, self.tuning.classifier.labels
        predictions: list[Any] = [None] * len(part.rows)
        for rows in token_batches(np.array([len(row) for row in part.rows]), 4096):
            ids, mask = (tensor.to(self.tuning.device) for tensor in pad_ids([part.rows[i] for i in rows]))
            scores = self.model(ids, mask).float().cpu()
            own = scores[:, 0].tolist() if labels is None else [labels[i] for i in scores.argmax(1).tolist()]
            for row, value in zip(rows, own, strict=True):
                predictions[row] = value
        return {f"dev_{name}": METRICS[name](part.gold, np.array(predictions)) for name in self.config.data.metrics}

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        self.engine.save(folder)
        (folder / STATE_FILE).write_text(json.dumps(self.history), encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Load a checkpoint; raise `InputError` if it is corrupted."""
        self.engine.load(folder)
        try:
            self.history = list(json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise checkpoint_error(folder, error) from error

    def save_teacher(self, folder: Path) -> None:
        """Write the fine-tuned teacher's folder: body, tokenizer, pooling, classifier."""
        source = locate(self.config.teacher, self.config.revision)
        body, classifier = self.model.body.model, self.model.classifier
        save_teacher(folder, body, classifier, source, self.tuning.max_length, self.history[-1])


def batches(rows: list[np.ndarray], size: int, seed: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield batches in random order that together hold every text once; texts of a batch have similar lengths.

    Args:
        rows: token ids of each text.
        size: texts per batch.
        seed: determines the order.

    Yields:
        int64 [B], indices into `rows`.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    order = rng.permutation(len(rows))
    lengths = np.array([len(row) for row in rows])
    every = []
    for start in range(0, len(order), size * BUCKET):
        bucket = order[start : start + size * BUCKET]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        every += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    yield from (every[i] for i in rng.permutation(len(every)))


def _read(tuning: FinetuningConfig, split: str) -> TokenizedSplit:
    """Read and tokenize a split of the data."""
    config, classifier = tuning.config, tuning.classifier
    data = read_split(config.name, config.data, config.source, split, classifier.joiner)
    info, tokenizer = load_teacher_info(
        config.teacher, TeacherOptions(revision=config.revision, max_length=tuning.max_length)
    )
    tokenizer.enable_truncation(tuning.max_length)
    encodings = tokenizer.encode_batch_fast([info.prompt + text for text in data.texts])
    rows = [np.array(encoding.ids, np.int64) for encoding in encodings]
    if classifier.labels is None:
        return TokenizedSplit(rows, torch.from_numpy(data.labels).float(), data.labels)
    index = {label: i for i, label in enumerate(classifier.labels)}
    targets = torch.tensor([index.get(label, -100) for label in data.labels.tolist()])
    return TokenizedSplit(rows, targets, data.labels)
