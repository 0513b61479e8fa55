"""The cost of a training step over the bare student, of its losses over a loop, and of the reference's training scheme.

Uses the labels of the students' dictionary, made first where missing, on one thread, like one of many workers.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.shared import STUDENTS, Bench, Figures
from benchmarks.timing import in_turn
from msense.config.distill import DistillConfig
from msense.constants import DEMO_TEACHER
from msense.dictionary import SenseDictionary
from msense.pipelines.distill import distillation_config
from msense.pipelines.distill_inputs import load_inputs
from msense.run.folder import RunFolder
from msense.runtime import LocalExecutor
from msense.teacher.body import resolve_dtype
from msense.teacher.model import Teacher
from msense.training.distiller import Trainer, build_student
from msense.training.engine import DDPEngine, prepare_process
from msense.training.label_dataset import LabelBatch, LabelSet
from msense.training.losses import LossWeights
from msense.training.sense_losses import SenseLabels, sense_losses

STEPS, TURNS = 12, 5
LARGER = 4096  # tokens of a larger batch, for the losses alone
Ways = dict[str, Callable[[], None]]


def step(bench: Bench) -> Figures:
    """Measure both kinds of student."""
    labels = bench.student("static")  # refers to them
    prepare_process(1)  # as a training worker does
    measured = {name: _measure(_trainer(bench, kind, labels)) for name, kind in STUDENTS.items()}
    figures = {f"distill.{key}_{name}": value for name, own in measured.items() for key, value in own.items()}
    return figures | {"distill.step_ratio": figures["distill.step_ratio_layers2"]}


def _trainer(bench: Bench, kind: str, labels: Path) -> Trainer:
    """Return the default training of `jobs/distill.py`, in this process."""
    config = DistillConfig(dictionary=str(bench.dictionary), teacher=DEMO_TEACHER, student=kind, epochs=1)
    run, executor = RunFolder(str(labels)), LocalExecutor(1, "cpu")
    training = distillation_config(config, load_inputs(config), run, executor, resolve_dtype("auto", "cpu"))
    training, label_set = replace(training, threads=1), LabelSet.open(run.root)
    engine = DDPEngine(build_student(training, label_set), config.weight_decay, config.clip)
    return Trainer(training, engine, label_set)


def _measure(trainer: Trainer) -> Figures:
    """Time several ways of running the same steps, in turn."""
    training, labels = trainer.training, trainer.labels
    batches = list(islice(labels.batches(0, 0, training.batch_tokens), STEPS))
    read = [labels.read(batch) for batch in batches]
    teacher = Teacher(DEMO_TEACHER, revision=None, layer=-1, dtype=training.teacher_dtype, device="cpu")

    def ours(mix: LossWeights = training.mix) -> None:
        trainer.training = replace(training, mix=mix)
        for batch in batches:
            trainer.backward(batch, report=False)
            trainer.engine.step(training.lr)

    def bare() -> None:
        for batch in read:
            output = _forward(trainer, batch)
            (output[0][batch.mask].sum() + output[1][batch.mask].sum()).backward()
            trainer.student.zero_grad()

    def reference() -> None:
        for batch in read:
            ids, dictionary = batch.ids[batch.mask], trainer.dictionary
            wanted = teacher.embed(batch.ids.numpy(), batch.mask.numpy())[batch.mask].float()
            hidden = _forward(trainer, batch)[1][batch.mask]
            reference_loss(dictionary, ids, hidden, reference_senses(dictionary, ids, wanted)).backward()
            trainer.engine.step(training.lr)

    senses = partial(ours, LossWeights(sense=1, temperature=training.mix.temperature))
    ways: Ways = {"ours": ours, "bare": bare, "senses": senses, "reference": reference}
    larger = [labels.read(batch) for batch in islice(labels.batches(0, 0, LARGER), 3)]
    ways |= _losses(trainer, read, "") | _losses(trainer, larger, f"_{LARGER}")
    del ways[f"loss_unbound_{LARGER}"]
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


def _losses(trainer: Trainer, read: list[LabelBatch], end: str) -> Ways:
    """Return cross-entropy over senses, forward and backward, as msense and as the reference compute it, by name."""
    outputs = [_forward(trainer, batch)[1][batch.mask].detach().requires_grad_() for batch in read]

    def ours() -> None:
        for x, batch in zip(outputs, read, strict=True):
            labels = SenseLabels(batch.senses[batch.mask].numpy().astype(np.uint16))
            loss, _ = sense_losses(x, batch.ids[batch.mask].numpy(), labels, trainer.space, replaced=False)
            assert loss is not None
            loss.total.backward()
            x.grad = None

    def loop(*, unbound: bool = False) -> None:
        for x, batch in zip(outputs, read, strict=True):
            ids = batch.ids[batch.mask]
            picked = reference_senses(trainer.dictionary, ids, x.detach())
            reference_loss(trainer.dictionary, ids, x.unbind(0) if unbound else x, picked).backward()
            x.grad = None

    return {f"loss_ours{end}": ours, f"loss_loop{end}": loop, f"loss_unbound{end}": partial(loop, unbound=True)}


def _forward(trainer: Trainer, batch: LabelBatch) -> tuple[torch.Tensor, torch.Tensor]:
    trainer.student.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=trainer.training.dtype == "bfloat16"):
        output = trainer.student(batch.ids, batch.mask)
    return output[0].float(), output[1].float()


def _senses(dictionary: SenseDictionary, token: int) -> torch.Tensor:
    """Return the senses of a token, float32 [K, D]."""
    return dictionary.centroids[dictionary.offsets[token] : dictionary.offsets[token + 1]].float()


def reference_senses(dictionary: SenseDictionary, ids: torch.Tensor, wanted: torch.Tensor) -> list[int]:
    """Return the sense with the largest dot product with the teacher's embedding, token by token."""
    return [int((_senses(dictionary, token) @ own).argmax()) for token, own in zip(ids.tolist(), wanted, strict=True)]


def reference_loss(
    dictionary: SenseDictionary, ids: torch.Tensor, rows: torch.Tensor | tuple[torch.Tensor, ...], targets: list[int]
) -> torch.Tensor:
    """Return the reference's loss, cross-entropy over a token's dot products with its senses, token by token.

    The reference indexes embeddings one by one; unbinding all at once halves the cost of the backward pass.
    """
    losses = []
    for i, (token, target) in enumerate(zip(ids.tolist(), targets, strict=True)):
        losses.append(cross_entropy((_senses(dictionary, token) @ rows[i])[None], torch.tensor([target])))
    return torch.stack(losses).sum()
