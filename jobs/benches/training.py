"""What a training step costs: over the bare student, its losses over a loop, an epoch over the reference's scheme.

In: the labels and dictionary that `distill` makes (made if they are not there). Out: ratios, each the median of turns, on
one thread as a worker of many has. Holds one student.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benches.distilling import STUDENTS, bench_shop
from benches.senses import MORE
from benches.shared import Bench, Figures
from benches.turns import in_turn
from msense.config import DEMO_TEACHER
from msense.distill_config import DistillConfig
from msense.label_set import LabelBatch, LabelSet
from msense.losses import Mix
from msense.sense_losses import SenseLabels, sense_losses
from msense.student import StudentSettings
from msense.teacher import Teacher, resolve_dtype
from msense.train_engine import Plain, keep_freed_memory
from msense.train_loop import Trainer, Training, new_student

STEPS, TURNS = 12, 5
LARGER = 4096  # tokens of a larger batch, for the losses alone


def step(bench: Bench) -> Figures:
    """Measure for both kinds of student."""
    shop = bench_shop(bench, "banking77", str(bench.data("banking77") / "train.csv"))
    dictionary = shop.dictionary(MORE)
    shop.student(dictionary, "static", student="static")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a worker does, for all that is timed
    labels = str(shop.folder / f"labels-{dictionary.name}")
    figures: Figures = {}
    for name, kind in STUDENTS.items():
        trainer = _trainer(labels, str(dictionary / "dictionary"), kind)
        figures |= {f"distill.{key}_{name}": value for key, value in _measure(trainer).items()}
    torch.set_num_threads(threads)
    return figures | {"distill.step_ratio": figures["distill.step_ratio_layers2"]}


def _trainer(labels: str, dictionary: str, kind: str) -> Trainer:
    """Return a training as `jobs/distill.py` has it by default, in this process."""
    config = DistillConfig(dictionary=dictionary, student=kind)
    weights: dict[str, Any] = dict(config.objective)
    training = Training(
        run=labels,
        dictionary=dictionary,
        teacher=DEMO_TEACHER,
        revision=None,
        teacher_dtype=resolve_dtype("auto", "cpu"),
        student=StudentSettings(kind=kind, heads=config.heads),
        mix=Mix(temperature=config.temperature, **weights),
        train_embeddings=config.train_embeddings,
        epochs=1,
        batch_tokens=config.batch_tokens,
        accumulate=1,
        lr=config.highest_rate,
        schedule=config.schedule,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
        dtype=resolve_dtype("auto", "cpu"),
        seed=0,
        deepspeed_stage=0,
        checkpoint_steps=config.checkpoint_steps,
        device="cpu",
        threads=1,
    )
    found = LabelSet.open(labels)
    engine = Plain(new_student(training, found), config.weight_decay, config.clip)
    return Trainer(training, engine, found)


def _measure(trainer: Trainer) -> dict[str, float]:
    """Time some steps in several ways, in turn."""
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
        trainer.training = replace(training, mix=Mix(sense=1, temperature=training.mix.temperature))
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
        "step_ms": 1000 * float(np.median(turns.seconds["ours"])) / STEPS,
    }


def _losses(trainer: Trainer, read: list[LabelBatch]) -> dict[str, Callable[[], None]]:
    """Return cross-entropy over senses, forward and backward, as we and as the reference compute it, by name."""
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
    """Return the sense of the largest dot product with the teacher's embedding, token by token."""
    dictionary, found = trainer.dictionary, []
    for i, token in enumerate(ids.tolist()):
        own = dictionary.centroids[dictionary.offsets[token] : dictionary.offsets[token + 1]].float()
        found.append(int((own @ wanted[i]).argmax()))
    return found


def _loop(
    trainer: Trainer, ids: torch.Tensor, found: torch.Tensor, targets: list[int], *, unbound: bool = False
) -> torch.Tensor:
    """Return the reference's loss, cross-entropy over a token's dot products with its senses, token by token.

    Embeddings are indexed one by one, as the reference does; unbound all at once, the way back costs half.
    """
    dictionary, losses = trainer.dictionary, []
    rows = found.unbind(0) if unbound else found
    for i, (token, target) in enumerate(zip(ids.tolist(), targets, strict=True)):
        own = dictionary.centroids[dictionary.offsets[token] : dictionary.offsets[token + 1]].float()
        losses.append(cross_entropy((own @ rows[i])[None], torch.tensor([target])))
    return torch.stack(losses).sum()
