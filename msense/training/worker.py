"""What one worker of a training does: resume from the last checkpoint, train, and report new checkpoints."""

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from msense.run.progress import Progress
from msense.student import Student, save_student
from msense.student.pruning import restore_embeddings
from msense.training.distiller import DistillationConfig, Trainer, build_student
from msense.training.engine import DDPEngine, DeepSpeedEngine, Engine, keep_freed_memory
from msense.training.finetuner import TEACHER, Finetuner, FinetuningConfig
from msense.training.group import ProcessGroup, Session
from msense.training.label_dataset import LabelSet

STUDENT = "student"  # folder of the last checkpoint


def distill(training: DistillationConfig, session: Session) -> list[dict[str, float]]:
    """Train a student; return the metrics of all epochs."""
    _prepare(training)
    labels = LabelSet.open(training.run)
    engine = _engine(build_student(training, labels), training, session)
    trainer = Trainer(training, engine, labels, ProcessGroup(session.rank, session.world))

    def report() -> None:
        state, last = trainer.state, trainer.state.epoch == training.epochs
        with tempfile.TemporaryDirectory() as folder:
            trainer.save(Path(folder))
            if last:
                with engine.whole():
                    if session.rank == 0:
                        restore_embeddings(trainer.student)
                        save_student(Path(folder, STUDENT), trainer.student)
            writes = session.rank == 0 or engine.every_rank
            name = f"epoch_{state.epoch:05d}_step_{state.step:08d}"
            session.report(dict(state.history[-1]) if state.history else {}, Path(folder) if writes else None, name)

    return _run(trainer, training, session, report)


def finetune(config: FinetuningConfig, session: Session) -> list[dict[str, float]]:
    """Fine-tune a teacher; return the metrics of all epochs."""
    _prepare(config)
    tuner = Finetuner(config, ProcessGroup(session.rank, session.world), session.wrap)

    def report() -> None:
        epoch = len(tuner.history)
        with tempfile.TemporaryDirectory() as folder:
            if session.rank == 0:
                tuner.save(Path(folder))
                if epoch == config.config.epochs:
                    tuner.save_teacher(Path(folder, TEACHER))
            session.report(dict(tuner.history[-1]), Path(folder) if session.rank == 0 else None, f"epoch_{epoch:05d}")

    return _run(tuner, config, session, report)


def _run(
    loop: Trainer | Finetuner,
    settings: DistillationConfig | FinetuningConfig,
    session: Session,
    report: Callable[[], None],
) -> list[dict[str, float]]:
    """Run the rest of a training; return the metrics of all epochs."""
    with session.latest_checkpoint() as folder:
        if folder is not None:
            loop.restore(folder)
    with Progress(settings.run, loop.history) if session.rank == 0 else nullcontext() as progress:
        for _ in loop.run(progress):
            report()
    return loop.history


def _prepare(settings: DistillationConfig | FinetuningConfig) -> None:
    """Set up this process: threads, and memory that stays with it."""
    torch.set_num_threads(settings.threads)
    keep_freed_memory()


def _engine(student: Student, training: DistillationConfig, session: Session) -> Engine:
    """Return the engine that the settings select."""
    if stage := training.deepspeed_stage:
        return DeepSpeedEngine(student, training.weight_decay, training.clip, stage, training.device)
    options = {"find_unused_parameters": True, "broadcast_buffers": False}  # some objectives do not use the sense head
    wrap = partial(session.wrap, **options)
    return DDPEngine(student, training.weight_decay, training.clip, wrap)
