"""What a training worker does: labels and a student in, a trained student out, a checkpoint an epoch.

Every worker derives the global batches from the labels' manifest and reads its share of each; gradients are averaged by
DDP. A checkpoint holds tensors and JSON only: the student, AdamW's state and the epochs that are done; the random numbers
of an epoch follow from (seed, epoch, worker). Ray Train calls `train_worker`; the rest never imports Ray. Holds the student
four times over, the dictionary's senses, and one slice of a batch.
"""

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from msense.config import NO_SENSE
from msense.dictionary import SenseDictionary
from msense.errors import BadInput, MsenseError
from msense.label_set import LabelBatch, LabelSet
from msense.losses import (
    Labelled,
    LossSum,
    Mix,
    SenseLabels,
    frequent_sense_accuracy,
    loss_sums,
    sense_accuracy,
    weighted,
)
from msense.student import Student, StudentSettings, make_student, save_student
from msense.student.student import StudentOutput

logger = logging.getLogger(__name__)

REPORT_SECONDS = 10.0
STATE, TENSORS, STUDENT = "state.json", "tensors.safetensors", "student"  # of a checkpoint; a student after the last


@dataclass(frozen=True)
class Training:
    """Everything a worker needs to know.

    Attributes:
        run: run folder with the labels.
        dictionary: its folder.
        teacher: name or folder.
        revision: of the teacher.
        student: what to make.
        mix: weights of the losses, and how senses are scored.
        threads: of torch, for each worker.
    Others are as in `DistillConfig`.
    """

    run: str
    dictionary: str
    teacher: str
    revision: str | None
    student: StudentSettings
    mix: Mix
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
    device: str
    threads: int


@dataclass
class _State:
    """Where a training stands."""

    student: Student
    optimizer: torch.optim.AdamW
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)  # metrics of each finished epoch


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


def begin(training: Training, checkpoint: Path | None = None) -> _State:
    """Make the student, and go on from a checkpoint if there is one.

    Raises:
        BadInput: the student cannot be made, or the checkpoint is damaged.
    """
    dictionary = SenseDictionary.load(training.dictionary)
    student = make_student(training.student, dictionary, training.teacher, training.revision).to(training.device)
    state = _State(student, _optimizer(student, training))
    if checkpoint is not None:
        _restore(state, checkpoint)
    return state


def _optimizer(student: Student, training: Training) -> torch.optim.AdamW:
    """AdamW; biases, norms and a transformer's embeddings are not decayed, a static student's way from its means is."""
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in student.named_parameters():
        parts[parameter.ndim == 2 and "embedding" not in name].append(parameter)
    groups = [{"params": p, "weight_decay": training.weight_decay * decayed} for decayed, p in parts.items()]
    return torch.optim.AdamW(groups, lr=training.lr)


def rate(step: int, steps: int, training: Training) -> float:
    """Return the learning rate's factor in a step: linear warm-up, then cosine, linear or constant."""
    warm = training.warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    left = 1 - (step - warm) / max(1.0, steps - warm)
    if training.schedule == "constant":
        return 1.0
    return left if training.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))


def run_epochs(
    training: Training, state: _State, model: nn.Module, group: Group, labels: LabelSet
) -> Iterator[dict[str, float]]:
    """Train from the state's epoch on; yield the metrics of each epoch, when the state is that of its end.

    Args:
        training: settings.
        state: as `begin` returns it.
        model: the state's student, maybe wrapped for data-parallel training.
        group: this worker among others.
        labels: of the run.

    Raises:
        MsenseError: a loss is NaN or infinite.
    """
    dictionary = SenseDictionary.load(training.dictionary).to(training.device)
    lengths = [labels.steps(epoch, training.seed, training.batch_tokens) for epoch in range(training.epochs)]
    for epoch in range(state.epoch, training.epochs):
        model.train()
        torch.manual_seed(int(np.random.SeedSequence([training.seed, epoch, group.rank]).generate_state(1)[0]))
        step, told, began = sum(lengths[:epoch]), time.monotonic(), time.monotonic()
        tokens, sums = 0, dict.fromkeys(training.mix.weights(), 0.0)
        batches = labels.batches(epoch, training.seed, training.batch_tokens)
        for number, passages in enumerate(batches):
            for part in state.optimizer.param_groups:
                part["lr"] = training.lr * rate(step, sum(lengths), training)
            found = _one_step(training, state, model, group, (labels, passages, dictionary))
            step, tokens = step + 1, tokens + int(labels.lengths[passages].sum())
            sums = {name: value + found[name] for name, value in sums.items()}
            if group.rank == 0 and time.monotonic() - told > REPORT_SECONDS:
                told = time.monotonic()
                done, rest = step / sum(lengths), (lengths[epoch] - number - 1) + sum(lengths[epoch + 1 :])
                speed = tokens / (told - began)
                logger.info(
                    "training: %d %%, epoch %d of %d, %s, %s tokens/s, %d s left", 100 * done, epoch + 1,
                    training.epochs, ", ".join(f"{k} {v:.4f}" for k, v in found.items()), f"{speed:,.0f}",
                    rest * (told - began) / (number + 1),
                )  # fmt: skip
        metrics = {f"train_{name}": value / max(1, lengths[epoch]) for name, value in sums.items()}
        metrics |= {"epoch": epoch + 1, "step": step, "tokens_per_s": tokens / (time.monotonic() - began)}
        metrics |= evaluate(training, state.student, group, labels, dictionary)
        state.epoch = epoch + 1
        state.history.append(metrics)
        yield metrics


def _one_step(
    training: Training,
    state: _State,
    model: nn.Module,
    group: Group,
    given: tuple[LabelSet, np.ndarray, SenseDictionary],
) -> dict[str, float]:
    """Take one step; return the mean of each loss over the global batch."""
    labels, passages, dictionary = given
    share = passages[group.rank :: group.world]
    slices = [part for part in np.array_split(share, training.accumulate) if len(part)]
    batches = [labels.read(part) for part in slices] or [labels.read(passages[:1])]  # all workers must take part
    own = [_counts(training.mix, batch) for batch in batches] if slices else []
    names = list(training.mix.weights())
    counts = dict(zip(names, group.sum([sum(c[n] for c in own) for n in names], training.device), strict=True))
    totals = dict.fromkeys(names, 0.0)
    state.optimizer.zero_grad(set_to_none=True)
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        hold = getattr(model, "no_sync", nullcontext) if not last else nullcontext
        with hold():
            sums = _losses(training, state.student, model, batch, dictionary)
            loss = weighted(training.mix, sums, {n: int(c) for n, c in counts.items()}, group.world)
            (loss if slices else loss * 0).backward()
        for name, part in sums.items() if slices else ():
            totals[name] += float(part.total.detach())
    every = group.sum(list(totals.values()), training.device)
    found = {name: total / max(1, counts[name]) for name, total in zip(names, every, strict=True)}
    if not all(map(math.isfinite, found.values())):
        told = ", ".join(f"{name} {value}" for name, value in found.items())
        raise MsenseError(f"the loss is not finite ({told}): give a smaller --lr, or --student-dtype float32")
    if training.clip:
        norm = nn.utils.clip_grad_norm_(state.student.parameters(), training.clip)
        if not torch.isfinite(norm):
            raise MsenseError("a gradient is not finite: give a smaller --lr, or --student-dtype float32")
    state.optimizer.step()
    return found


def _counts(mix: Mix, batch: LabelBatch) -> dict[str, int]:
    """What each loss of a batch counts: tokens with a sense, passages, or tokens."""
    labelled = int((batch.senses >= 0).sum())
    kinds = {"sense": labelled, "pooled": len(batch.ids), "replaced": len(batch.ids)}
    return {name: kinds.get(name, int(batch.mask.sum())) for name in mix.weights()}


def _losses(
    training: Training, student: Student, model: nn.Module, batch: LabelBatch, dictionary: SenseDictionary
) -> dict[str, LossSum]:
    """Losses of one slice."""
    mask = batch.mask.to(training.device)
    with _autocast(training):
        output: StudentOutput = model(batch.ids.to(training.device), mask)
    output = StudentOutput(output[0].float(), output[1].float())
    return loss_sums(training.mix, output, labelled(batch, training.device), dictionary, student.sentence)


def labelled(batch: LabelBatch, device: str) -> Labelled:
    """Return labels as losses take them."""
    if batch.soft_senses is None or batch.soft_weights is None:
        senses = SenseLabels(_numbers(batch.senses[batch.mask]))
    else:
        senses = SenseLabels(_numbers(batch.soft_senses[batch.mask]), batch.soft_weights[batch.mask].numpy())
    sentences = None if batch.pooled is None else batch.pooled.to(device)
    return Labelled(batch.ids, batch.mask.to(device), senses, sentences)


def _numbers(senses: Tensor) -> np.ndarray:
    """Sense numbers as the labels store them: -1, none, becomes 65535."""
    return np.asarray(senses.masked_fill(senses < 0, NO_SENSE).numpy().astype(np.uint16))


def _autocast(training: Training) -> Any:  # noqa: ANN401 - a context
    return torch.autocast(training.device, torch.bfloat16, enabled=training.dtype == "bfloat16")


@torch.no_grad()
def evaluate(
    training: Training, student: Student, group: Group, labels: LabelSet, dictionary: SenseDictionary
) -> dict[str, float]:
    """Measure a student on the passages that are held out: losses, sense accuracy and its baseline, pooled cosine."""
    student.eval()
    passages = labels.held_out()
    own = passages[np.argsort(labels.lengths[passages], kind="stable")][group.rank :: group.world]
    names = [*training.mix.weights(), "accuracy", "frequent", "cosine"]
    totals, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    size = max(1, training.batch_tokens // max(1, int(labels.lengths[own].max(initial=1))))
    for at in range(0, len(own), size):
        batch = labels.read(own[at : at + size])
        mask, ids = batch.mask.to(training.device), batch.ids[batch.mask].numpy()
        with _autocast(training):
            output = student(batch.ids.to(training.device), mask)
        output = StudentOutput(output[0].float(), output[1].float())
        told = loss_sums(training.mix, output, labelled(batch, training.device), dictionary, student.sentence)
        numbers = _numbers(batch.senses[batch.mask])
        told["accuracy"] = sense_accuracy(output.senses[mask], ids, numbers, dictionary)
        told["frequent"] = frequent_sense_accuracy(ids, numbers, dictionary)
        if batch.pooled is not None:
            vectors = student.sentence(output.hidden, mask)
            cosine = torch.nn.functional.cosine_similarity(vectors, batch.pooled.to(training.device)).sum()
            told["cosine"] = LossSum(cosine, len(vectors))
        for name, part in told.items():
            totals[name] += float(part.total)
            counts[name] += part.count
    summed = group.sum([*totals.values(), *counts.values()], training.device)
    pairs = zip(names, summed[: len(names)], summed[len(names) :], strict=True)
    return {f"held_out_{name}": total / count for name, total, count in pairs if count}


def save_checkpoint(folder: Path, state: _State) -> None:
    """Write where a training stands; the JSON file last."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"student.{name}": value for name, value in state.student.state_dict().items()}
    for number, of in state.optimizer.state_dict()["state"].items():
        tensors |= {f"{number}.{name}": value for name, value in of.items()}
    save_file({name: value.detach().cpu().clone() for name, value in tensors.items()}, folder / TENSORS)
    (folder / STATE).write_text(json.dumps({"epoch": state.epoch, "history": state.history}), encoding="utf-8")


def _restore(state: _State, folder: Path) -> None:
    """Take over a checkpoint's student, optimizer and epochs."""
    try:
        told = json.loads((folder / STATE).read_text(encoding="utf-8"))
        state.epoch, state.history = int(told["epoch"]), list(told["history"])
        student: dict[str, Tensor] = {}
        found: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(folder / TENSORS).items():
            owner, _, key = name.partition(".")
            (student if owner == "student" else found.setdefault(int(owner), {}))[key] = value
        state.student.load_state_dict(student)
        groups = state.optimizer.state_dict()["param_groups"]
        state.optimizer.load_state_dict({"state": found, "param_groups": groups})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise BadInput(
            f"the checkpoint {folder} is damaged ({error}): delete it to go on from the one before"
        ) from error


def train_worker(given: dict[str, Any]) -> list[dict[str, float]]:
    """Train as one worker of Ray Train; return the metrics of all epochs."""
    import tempfile

    import ray.train
    from ray.train.torch import prepare_model

    training: Training = given["training"]
    torch.set_num_threads(training.threads)
    context = ray.train.get_context()
    group = Group(context.get_world_rank(), context.get_world_size())
    latest = ray.train.get_checkpoint()
    with latest.as_directory() if latest else nullcontext() as folder:
        state = begin(training, Path(folder) if folder else None)
    options = {"find_unused_parameters": True, "broadcast_buffers": False}  # no loss may ask for the senses; means stay
    model = prepare_model(state.student, parallel_strategy_kwargs=options)
    for metrics in run_epochs(training, state, model, group, LabelSet.open(training.run)):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if group.rank == 0:
                save_checkpoint(Path(folder), state)
                if state.epoch == training.epochs:
                    save_student(Path(folder, STUDENT), state.student)
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"epoch_{state.epoch:05d}")
            # a report that returns is not yet a checkpoint to go on from
            ray.train.get_all_reported_checkpoints(consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED)
    return state.history
