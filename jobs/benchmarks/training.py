"""The cost of a training step over the bare student, of its losses over a loop, and of the reference's training scheme.

Uses the labels and dictionary of `distill`, made first where missing, on one thread, like one of many workers.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.distilling import STUDENTS, banking_shop, student
from benchmarks.senses import MORE
from benchmarks.shared import Bench, Figures
from benchmarks.turns import in_turn
from msense.config.distill import DistillConfig
from msense.constants import DEMO_TEACHER
from msense.pipelines.distill import distillation_config
from msense.run.folder import RunFolder
from msense.runtime.resources import Resources
from msense.teacher.body import resolve_dtype
from msense.teacher.model import Teacher
from msense.training.distiller import Trainer, build_student
from msense.training.engine import DDPEngine, keep_freed_memory
from msense.training.label_dataset import LabelBatch, LabelSet
from msense.training.losses import LossWeights
from msense.training.sense_losses import SenseLabels, sense_losses

STEPS, TURNS = 12, 5
LARGER = 4096  # tokens of a larger batch, for the losses alone


def step(bench: Bench) -> Figures:
    """Measure both kinds of student."""
    shop = banking_shop(bench)
    dictionary = shop.dictionary(MORE)
    student(shop, dictionary, "static")  # which makes the labels
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a training worker does
    labels = str(shop.folder / f"labels-{dictionary.name}")
    figures: Figures = {}
    for name, kind in STUDENTS.items():
        trainer = _trainer(labels, str(dictionary / "dictionary"), kind)
        figures |= {f"distill.{key}_{name}": value for key, value in _measure(trainer).items()}
    torch.set_num_threads(threads)
    return figures | {"distill.step_ratio": figures["distill.step_ratio_layers2"]}


def _trainer(labels: str, dictionary: str, kind: str) -> Trainer:
    """Return the default training of `jobs/distill.py`, in this process."""
    dtype = resolve_dtype("auto", "cpu")
    config = DistillConfig(dictionary=dictionary, student=kind, student_dtype=dtype, epochs=1)
    source: Any = SimpleNamespace(dictionary=dictionary, teacher=DEMO_TEACHER, info=SimpleNamespace(revision=None))
    training = distillation_config(config, source, RunFolder(labels), Resources(1, 1, "cpu"), dtype)
    training, label_set = replace(training, threads=1), LabelSet.open(labels)
    engine = DDPEngine(build_student(training, label_set), config.weight_decay, config.clip)
    return Trainer(training, engine, label_set)


def _measure(trainer: Trainer) -> dict[str, float]:
    """Time several ways of running the same steps, in turn."""
    training = trainer.training
    batches = list(islice(trainer.labels.batches(0, 0, training.batch_tokens), STEPS))
    read = [trainer.labels.read(batch) for batch in batches]
    teacher = Teacher(
        DEMO_TEACHER, revision=None, layer=-1, dtype=training.teacher_dtype, device="cpu", threads=training.threads
    )

    def ours() -> None:
        for batch in batches:
            trainer._step(batch, training.lr, False)

    def ours_senses() -> None:
        trainer.training = replace(training, mix=LossWeights(sense=1, temperature=training.mix.temperature))
        ours()
        trainer.training = training

    def bare() -> None:
        for batch in read:
            output = _forward(trainer, batch)
            (output[0][batch.mask].sum() + output[1][batch.mask].sum()).backward()
            trainer.student.zero_grad()

    def reference() -> None:
        for batch in read:
            wanted = teacher.embed(batch.ids.numpy(), batch.mask.numpy())[batch.mask].float()
            hidden = _forward(trainer, batch)[1][batch.mask]
            _loop(trainer, batch.ids[batch.mask], hidden, _picked(trainer, batch.ids[batch.mask], wanted)).backward()
            trainer.engine.step(training.lr)

    ways: dict[str, Callable[[], None]] = {"ours": ours, "bare": bare, "senses": ours_senses, "reference": reference}
    ways |= _losses(trainer, read)
    larger = [trainer.labels.read(batch) for batch in islice(trainer.labels.batches(0, 0, LARGER), 3)]
    ways |= {f"{name}_{LARGER}": way for name, way in _losses(trainer, larger).items() if name != "loss_unbound"}
    for way in ways.values():
        way()
    turns = in_turn(ways, TURNS)
    return {
        "step_ratio": turns.ratio("ours", "bare"),
        "epoch_speedup": turns.ratio("reference", "senses"),
        "epoch_speedup_default": turns.ratio("reference", "ours"),
        "loss_speedup": turns.ratio("loss_loop", "loss_ours"),
        f"loss_speedup_{LARGER}": turns.ratio(f"loss_loop_{LARGER}", f"loss_ours_{LARGER}"),
        "loss_speedup_unbound": turns.ratio("loss_unbound", "loss_ours"),
        "step_ms": 1000 * turns.median("ours") / STEPS,
    }


def _losses(trainer: Trainer, read: list[LabelBatch]) -> dict[str, Callable[[], None]]:
    """Return cross-entropy over senses, forward and backward, as msense and as the reference compute it, by name."""
    outputs = [_forward(trainer, batch)[1][batch.mask].detach().requires_grad_() for batch in read]

    def loss_ours() -> None:
        for x, batch in zip(outputs, read, strict=True):
            senses = SenseLabels(batch.senses[batch.mask].numpy().astype(np.uint16))
            loss, _ = sense_losses(x, batch.ids[batch.mask].numpy(), senses, trainer.space, replaced=False)
            assert loss is not None
            loss.total.backward()
            x.grad = None

    def loss_loop(*, unbound: bool = False) -> None:
        for x, batch in zip(outputs, read, strict=True):
            ids = batch.ids[batch.mask]
            _loop(trainer, ids, x, _picked(trainer, ids, x.detach()), unbound=unbound).backward()
            x.grad = None

    return {"loss_ours": loss_ours, "loss_loop": loss_loop, "loss_unbound": partial(loss_loop, unbound=True)}


def _forward(trainer: Trainer, batch: LabelBatch) -> tuple[torch.Tensor, torch.Tensor]:
    trainer.student.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=trainer.training.dtype == "bfloat16"):
        output = trainer.student(batch.ids, batch.mask)
    return output[0].float(), output[1].float()


def _picked(trainer: Trainer, ids: torch.Tensor, wanted: torch.Tensor) -> list[int]:
    """Return the sense with the largest dot product with the teacher's embedding, token by token."""
    return [int((_senses(trainer, token) @ own).argmax()) for token, own in zip(ids.tolist(), wanted, strict=True)]


def _senses(trainer: Trainer, token: int) -> torch.Tensor:
    """Return the senses of a token, float32 [K, D]."""
    dictionary = trainer.dictionary
    return dictionary.centroids[dictionary.offsets[token] : dictionary.offsets[token + 1]].float()


def _loop(
    trainer: Trainer, ids: torch.Tensor, hidden: torch.Tensor, targets: list[int], *, unbound: bool = False
) -> torch.Tensor:
    """Return the reference's loss, cross-entropy over a token's dot products with its senses, token by token.

    The reference indexes embeddings one by one; unbinding all at once halves the cost of the backward pass.
    """
    losses = []
    rows = hidden.unbind(0) if unbound else hidden
    for i, (token, target) in enumerate(zip(ids.tolist(), targets, strict=True)):
        losses.append(cross_entropy((_senses(trainer, token) @ rows[i])[None], torch.tensor([target])))
    return torch.stack(losses).sum()
