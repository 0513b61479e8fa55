"""Fine-tune a teacher with a classifier.

Memory: four times the teacher (weights, gradients, optimizer), the texts as token ids, and one batch.
"""

import sys
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
from msense.metrics import METRICS
from msense.student.transformer import TransformerBody, load_weights, read_source
from msense.teacher.batching import iter_batches, pad_batch
from msense.teacher.body import load_stored
from msense.teacher.classifier import Classifier, ClassifierConfig
from msense.teacher.files import locate
from msense.teacher.finetuned import save_teacher
from msense.teacher.spec import TeacherOptions, load_teacher_info
from msense.training.engine import DDPEngine, prepare_process
from msense.training.loop import ProcessGroup, Session, TrainingLoop, TrainingSettings, run_worker

BUCKET = 50  # batches sorted by length together: enough for little padding, few enough that batches vary
TEACHER = "teacher"  # folder in the last checkpoint and in the run folder


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TrainingSettings):
    """Settings of a worker."""

    config: FinetuneConfig  # with absolute paths and the teacher's commit
    classifier: ClassifierConfig
    max_length: int  # longest text in tokens
    has_dev: bool  # whether there is a dev split to evaluate after every epoch
    schedule: str = "linear"
    checkpoint_steps: int = sys.maxsize  # after every epoch only


def train_teacher(settings: FinetuneSettings, session: Session) -> list[dict[str, float]]:
    """Fine-tune a teacher as one worker; return the metrics of all epochs."""
    prepare_process(settings.threads)
    return run_worker(Finetuner(settings, ProcessGroup(session.rank, session.world), session.wrap), session)


class TeacherWithClassifier(nn.Module):
    """A teacher's body, computing as `Teacher.embed` does, with a classifier."""

    def __init__(self, settings: FinetuneSettings) -> None:
        super().__init__()
        config = settings.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            source = read_source(load_stored(config.teacher, config.revision, config.attention))
            self.body = TransformerBody(source.settings)
            load_weights(self.body, source)
            self.classifier = Classifier(settings.classifier, config.dropout)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return scores [B, labels] of token ids int64 [B, L] where the mask is true."""
        return self.classifier(self.body(ids, mask), mask)


@dataclass(frozen=True)
class TokenizedSplit:
    """A tokenized split of the data."""

    rows: list[np.ndarray]  # token ids of each text
    targets: Tensor  # label indices, int64 [P] (-100 for an unknown label), or float32 [P]
    gold: np.ndarray  # the labels themselves


class Finetuner(TrainingLoop):
    """Fine-tuning of one worker.

    Example:
        >>> tuner = Finetuner(settings)  # one process, without Ray
        >>> states = list(tuner.run())
        >>> tuner.export(Path("checkpoint"))
    """

    def __init__(self, settings: FinetuneSettings, group: ProcessGroup | None = None, wrap: Any = None) -> None:
        self.model = TeacherWithClassifier(settings).to(settings.device)
        engine = DDPEngine(self.model, settings.weight_decay, settings.clip, wrap)
        super().__init__(settings, engine, group, ("loss",))
        self.tuning = settings
        self.train_split = read_tokenized(settings, TRAIN)
        self.dev_split = read_tokenized(settings, DEV) if settings.has_dev and self.group.rank == 0 else None

    def batches(self, epoch: int) -> Iterator[np.ndarray]:
        """Yield the texts of each step."""
        return batches(self.train_split.rows, self.tuning.config.batch_size, (self.tuning.seed, epoch))

    def count_tokens(self, batch: np.ndarray) -> int:
        """Return the number of tokens of texts."""
        return sum(len(self.train_split.rows[i]) for i in batch)

    def backward(self, batch: np.ndarray, report: bool = False) -> dict[str, float]:
        """Accumulate gradients; return the mean loss."""
        group, split, device = self.group, self.train_split, self.tuning.device
        own = batch[group.rank :: group.world]
        rows = own if len(own) else batch[:1]  # all workers must take part in the reduction
        with torch.autocast(device, torch.bfloat16, enabled=self.tuning.dtype == "bfloat16"):
            scores = self._scores(self.engine.model, *pad_batch([split.rows[i] for i in rows]))
        targets = split.targets[torch.from_numpy(rows)].to(device)
        if self.tuning.config.data.regression:
            loss = mse_loss(scores[:, 0], targets, reduction="sum")
        else:
            loss = cross_entropy(scores, targets, reduction="sum")
        loss = loss if len(own) else loss * 0
        self.engine.backward(loss * group.world / len(batch))  # gradients are averaged over workers
        return {"loss": group.sum([float(loss.detach())], device)[0] / len(batch)}

    def _scores(self, model: nn.Module, ids: np.ndarray, mask: np.ndarray) -> Tensor:
        """Return scores, float32 [B, labels], of token ids int [B, L] with a mask bool [B, L]."""
        inputs = (torch.from_numpy(values).to(self.tuning.device) for values in (ids.astype(np.int64), mask))
        return model(*inputs).float()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the task's metrics on the dev split; empty on workers without one."""
        if self.dev_split is None:
            return {}
        self.engine.model.eval()
        split, labels = self.dev_split, self.tuning.classifier.labels
        predictions: np.ndarray = np.empty(len(split.rows), np.float64 if labels is None else np.array(labels).dtype)
        for batch in iter_batches(split.rows, 4096):
            scores = self._scores(self.model, batch.ids, batch.mask).cpu().numpy()
            predictions[batch.rows] = scores[:, 0] if labels is None else np.array(labels)[scores.argmax(1)]
        return {f"dev_{name}": METRICS[name](split.gold, predictions) for name in self.tuning.config.data.metrics}

    def export(self, folder: Path) -> None:
        """Write the fine-tuned teacher's folder: body, tokenizer, pooling, classifier."""
        source = locate(self.tuning.config.teacher, self.tuning.config.revision)
        figures = {name: value for name, value in self.state.history[-1].items() if name != "tokens_per_s"}
        model, length = self.model, self.tuning.max_length
        save_teacher(folder / TEACHER, model.body.model, model.classifier, source, length, figures)


def batches(rows: list[np.ndarray], size: int, seed: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield each text once, in batches of at most `size` texts of similar lengths, int64 [B], ordered by the seed."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    order = rng.permutation(len(rows))
    lengths = np.array([len(row) for row in rows])
    every = []
    for start in range(0, len(order), size * BUCKET):
        bucket = order[start : start + size * BUCKET]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        every += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    yield from (every[i] for i in rng.permutation(len(every)))


def read_tokenized(settings: FinetuneSettings, split: str) -> TokenizedSplit:
    """Read and tokenize a split of the data."""
    config, classifier = settings.config, settings.classifier
    data = read_split(config.name, config.data, config.source, split, classifier.joiner)
    options = TeacherOptions(revision=config.revision, max_length=settings.max_length, attention=config.attention)
    info, tokenizer = load_teacher_info(config.teacher, options)
    tokenizer.enable_truncation(settings.max_length, direction=info.truncation_side)
    encodings = tokenizer.encode_batch_fast([info.prompt + text for text in data.texts])
    rows = [np.array(encoding.ids, np.int64) for encoding in encodings]
    if classifier.labels is None:
        return TokenizedSplit(rows, torch.from_numpy(data.labels).float(), data.labels)
    index = {label: i for i, label in enumerate(classifier.labels)}
    targets = torch.tensor([index.get(label, -100) for label in data.labels.tolist()])
    return TokenizedSplit(rows, targets, data.labels)
