"""What a training worker does: labels and a student in, a trained student out, checkpoints on the way.

Every worker derives the global batches from the labels' manifest and reads its share of each; `train_engine` averages
gradients and takes the steps. A checkpoint says how many steps are done; the random numbers of a step follow from (seed,
epoch, step, worker). Never imports Ray. Holds the student four times over, the dictionary's senses, up to
`sense_losses.KEPT_BYTES` of them in float32 too, one slice of a batch, and where losses are on hidden states the teacher.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from msense import storage
from msense.config import NO_SENSE
from msense.dictionary import SenseDictionary
from msense.errors import BadInput, MsenseError
from msense.label_set import LabelBatch, LabelSet
from msense.losses import (
    Labelled,
    Mix,
    frequent_sense_accuracy,
    loss_sums,
    sense_accuracy,
    weighted,
)
from msense.sense_losses import LossSum, SenseLabels
from msense.student import Student, StudentSettings, make_student
from msense.student.narrow import narrow
from msense.student.static import StaticBody
from msense.student.student import StudentOutput
from msense.teacher import Teacher
from msense.train_engine import Engine, damaged
from msense.train_progress import Progress

STATE = "state.json"  # of a checkpoint


@dataclass(frozen=True)
class Training:
    """Everything a worker needs to know.

    Attributes:
        run: run folder with the labels.
        dictionary: its folder.
        teacher: name or folder.
        revision: of the teacher.
        teacher_dtype: where losses are on hidden states.
        student: what to make.
        mix: weights of the losses, and how senses are scored.
        threads: of torch, for each worker.
    Others are as in `DistillConfig`.
    """

    run: str
    dictionary: str
    teacher: str
    revision: str | None
    teacher_dtype: str
    student: StudentSettings
    mix: Mix
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
    threads: int


@dataclass
class State:
    """Where a training stands.

    Attributes:
        epoch: epochs that are finished.
        step: steps that are done of the epoch under way.
        tokens: that these steps have read.
        seconds: that they took.
        sums: of their losses, by name.
        history: metrics of each finished epoch.
    """

    epoch: int = 0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """The workers of a training; one alone needs no process group."""

    rank: int = 0
    world: int = 1

    def sum(self, values: list[float], device: str) -> list[float]:
        """Add numbers up over all workers."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return [float(x) for x in total.tolist()]


def new_student(training: Training, labels: LabelSet | None = None) -> Student:
    """Make the student that a training begins with.

    Args:
        training: settings.
        labels: of the run: a static student's tokens move the further the more often they are seen there, and tables of
            tokens that are trained are narrowed to those there. None: for a look at it.

    Raises:
        BadInput: it cannot be made.
    """
    dictionary = SenseDictionary.load(training.dictionary)
    trained, held_out = (None, None) if labels is None else labels.token_counts()
    student = make_student(training.student, dictionary, training.teacher, training.revision, trained)
    student = student.to(training.device)
    if not isinstance(student.body, StaticBody) and not training.train_embeddings:
        student.body.model.get_input_embeddings().requires_grad_(False)
    elif trained is not None:
        narrow(student, torch.from_numpy(np.flatnonzero(trained + held_out)))
    return student


class Trainer:
    """One worker of a training: settings, engine, labels, dictionary, and where it stands."""

    def __init__(self, training: Training, engine: Engine, labels: LabelSet, group: Group | None = None) -> None:
        """Bring together what a training needs; the teacher is loaded where losses are on hidden states."""
        self.training, self.engine, self.labels = training, engine, labels
        self.group, self.state = group or Group(), State()
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

    def run(self, progress: Progress | None = None) -> Iterator[State]:
        """Train from the state on; yield it at every step of which a checkpoint is wanted, the end of an epoch among them.

        Args:
            progress: is told how it goes.

        Raises:
            MsenseError: a loss or gradient is NaN or infinite.
        """
        training, state = self.training, self.state
        order = (training.seed, training.batch_tokens)
        lengths = [self.labels.steps(epoch, *order) for epoch in range(training.epochs)]
        for epoch in range(state.epoch, training.epochs):
            self.engine.model.train()
            for passages in self.labels.batches(epoch, *order, first_step=state.step):
                began = time.monotonic()
                numbers = (training.seed, epoch, state.step, self.group.rank)
                torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
                done = sum(lengths[:epoch]) + state.step
                is_told = progress is not None and progress.is_due()
                found = self._step(
                    passages, training.lr * rate(done, sum(lengths), training.warmup, training.schedule), is_told
                )
                state.step += 1
                state.tokens += int(self.labels.lengths[passages].sum())
                state.seconds += time.monotonic() - began
                for name in training.mix.weights():
                    state.sums[name] = state.sums.get(name, 0.0) + found[name]
                if progress is not None and is_told:
                    left = (sum(lengths) - done - 1) * state.seconds / state.step
                    speed = {"tokens_per_s": state.tokens / state.seconds, "seconds_left": left}
                    progress.tell(done + 1, sum(lengths), epoch + 1, found, speed)
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

    def _step(self, passages: np.ndarray, lr: float, is_told: bool) -> dict[str, float]:
        """Take one step; return the mean of each loss over the global batch, and if it is told the sense accuracy here."""
        training, group = self.training, self.group
        share = passages[group.rank :: group.world]
        slices = [part for part in np.array_split(share, training.accumulate) if len(part)]
        batches = [self.labels.read(part) for part in slices] or [self.labels.read(passages[:1])]  # all must take part
        own = [_counts(training.mix, batch) for batch in batches] if slices else []
        names = list(training.mix.weights())
        counts = dict(zip(names, group.sum([sum(c[n] for c in own) for n in names], training.device), strict=True))
        totals, right = dict.fromkeys(names, 0.0), []
        for number, batch in enumerate(batches):
            with self.engine.slice_of_step(last=number == len(batches) - 1):
                output, given = self._forward(batch, self.engine.model)
                sums = loss_sums(training.mix, output, given, self.space, self.student.sentence)
                loss = weighted(training.mix, sums, {n: int(c) for n, c in counts.items()}, group.world)
                self.engine.backward(loss if slices else loss * 0)
            for name, part in sums.items() if slices else ():
                totals[name] += float(part.total.detach())
            if is_told:
                right.append(self._accuracy(output, batch))
        every = group.sum(list(totals.values()), training.device)
        found = {name: total / max(1, counts[name]) for name, total in zip(names, every, strict=True)}
        if not all(map(math.isfinite, found.values())):
            told = ", ".join(f"{name} {value}" for name, value in found.items())
            raise MsenseError(f"the loss is not finite ({told}): give a smaller --lr, or --student-dtype float32")
        self.engine.step(lr)
        if is_told:
            found["accuracy"] = float(sum(part.total for part in right)) / max(1, sum(part.count for part in right))
        return found

    def _forward(self, batch: LabelBatch, model: nn.Module) -> tuple[StudentOutput, Labelled]:
        """Return a student's output for a slice, and what it is held against."""
        device = self.training.device
        mask = batch.mask.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=self.training.dtype == "bfloat16"):
            output = model(batch.ids.to(device), mask)
        hidden = None
        if self.teacher is not None:
            hidden = self.teacher.embed(batch.ids.numpy(), batch.mask.numpy())[mask].float()
        return StudentOutput(output[0].float(), output[1].float()), _labelled(batch, mask, hidden)

    def _accuracy(self, output: StudentOutput, batch: LabelBatch) -> LossSum:
        return sense_accuracy(output.senses.flatten(0, 1), *_picked(batch), self.dictionary, self.space.metric)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure the student on the passages that are held out: losses, sense accuracy and its baseline, pooled cosine."""
        self.engine.model.eval()
        training, labels, group = self.training, self.labels, self.group
        passages = labels.held_out()
        own = passages[np.argsort(labels.lengths[passages], kind="stable")][group.rank :: group.world]
        names = [*training.mix.weights(), "accuracy", "frequent", "pooled_cosine"]
        totals, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        with self.engine.whole():
            for batch in self._batches(own):
                output, given = self._forward(batch, self.student)
                told = loss_sums(training.mix, output, given, self.space, self.student.sentence)
                told["accuracy"] = self._accuracy(output, batch)
                told["frequent"] = frequent_sense_accuracy(*_picked(batch), self.dictionary)
                if given.sentences is not None:
                    vectors = self.student.sentence(output.hidden, given.mask)
                    cosine = nn.functional.cosine_similarity(vectors, given.sentences).sum()
                    told["pooled_cosine"] = LossSum(cosine, len(vectors))
                for name, part in told.items():
                    totals[name] += float(part.total)
                    counts[name] += part.count
        summed = group.sum([*totals.values(), *counts.values()], training.device)
        pairs = zip(names, summed[: len(names)], summed[len(names) :], strict=True)
        return {f"held_out_{name}": total / count for name, total, count in pairs if count}

    def _batches(self, passages: np.ndarray) -> Iterator[LabelBatch]:
        """Read passages that are sorted by length, a step's tokens at a time."""
        longest = max(1, int(self.labels.lengths[passages].max(initial=1)))
        size = max(1, self.training.batch_tokens // longest)
        for at in range(0, len(passages), size):
            yield self.labels.read(passages[at : at + size])

    def save(self, folder: Path) -> None:
        """Write where this training stands; the JSON file last."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.group.rank == 0 or self.engine.every_rank:
            self.engine.save(folder)
        if self.group.rank == 0:
            told = asdict(self.state) | {"workers": self.group.world}
            storage.write_json(str(folder / STATE), told)

    def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            BadInput: it is damaged, or of another number of workers, each of whom wrote a part of it.
        """
        try:
            told = storage.read_json(str(folder / STATE))
            if told is None:
                raise ValueError(f"{STATE} is not there, or does not hold what was written")
            epoch, step, tokens, workers = (int(told[name]) for name in ("epoch", "step", "tokens", "workers"))
            self.state = State(epoch, step, tokens, float(told["seconds"]), dict(told["sums"]), list(told["history"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise damaged(folder, error) from error
        if self.engine.every_rank and workers != self.group.world:
            raise BadInput(
                f"the checkpoint {folder} was made by {workers} workers, and DeepSpeed goes on with as many only: give "
                f"--workers {workers}, or delete it"
            )
        self.engine.load(folder)


def rate(step: int, steps: int, warmup: float, schedule: str) -> float:
    """Return the learning rate's factor in a step: linear warm-up, then cosine, linear or constant.

    `one-cycle` rises from 1/25 and falls to 1/250,000, both by a cosine (Smith and Topin 2019; the numbers are torch's).
    """
    warm = warmup * steps
    if step < warm:
        if schedule == "one-cycle":
            return _between(1 / 25, 1.0, step / warm)
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(1.0, steps - warm)
    if schedule == "constant":
        return 1.0
    return 1 - done if schedule == "linear" else _between(1.0, 1 / 250_000 if schedule == "one-cycle" else 0.0, done)


def _between(first: float, last: float, share: float) -> float:
    """Go from one number to another by half a cosine."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


def _counts(mix: Mix, batch: LabelBatch) -> dict[str, int]:
    """What each loss of a batch counts: tokens with a sense, passages, or tokens."""
    labelled = int((batch.senses >= 0).sum())
    kinds = {"sense": labelled, "pooled": len(batch.ids), "replaced": len(batch.ids)}
    return {name: kinds.get(name, int(batch.mask.sum())) for name in mix.weights()}


def _labelled(batch: LabelBatch, mask: Tensor, hidden: Tensor | None) -> Labelled:
    """Return labels as losses take them."""
    if batch.soft_senses is None or batch.soft_weights is None:
        senses = SenseLabels(_numbers(batch.senses.flatten()))
    else:
        senses = SenseLabels(_numbers(batch.soft_senses.flatten(0, 1)), batch.soft_weights.flatten(0, 1).numpy())
    sentences = None if batch.pooled is None else batch.pooled.to(mask.device)
    return Labelled(batch.ids, mask, senses, sentences, hidden)


def _picked(batch: LabelBatch) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch's token ids and the teacher's senses, place by place [B·L]; padding has none."""
    return batch.ids.flatten().numpy(), _numbers(batch.senses.flatten())


def _numbers(senses: Tensor) -> np.ndarray:
    """Sense numbers as the labels store them: -1, none, becomes 65535."""
    return np.asarray(senses.masked_fill(senses < 0, NO_SENSE).numpy().astype(np.uint16))
