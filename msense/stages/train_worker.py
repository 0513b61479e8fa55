"""Ray Train worker of a distillation: resume from the last checkpoint, train, and report new checkpoints."""

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import CheckpointConsistencyMode
from ray.train.torch import get_device, prepare_model

from msense.run.progress import Progress
from msense.student import Student, save_student
from msense.student.pruning import restore_embeddings
from msense.training.distiller import DistillationConfig, Trainer, build_student
from msense.training.engine import DDPEngine, DeepSpeedEngine, Engine, keep_freed_memory
from msense.training.group import ProcessGroup
from msense.training.label_dataset import LabelSet

STUDENT = "student"  # folder of the last checkpoint


def train_worker(given: dict[str, Any]) -> list[dict[str, float]]:
    """Train with the `Training` in `given["training"]`; return the metrics of all epochs."""
    training: DistillationConfig = given["training"]
    torch.set_num_threads(training.threads)
    keep_freed_memory()
    if training.device == "cuda":
        torch.cuda.set_device(get_device())
    context = ray.train.get_context()
    group = ProcessGroup(context.get_world_rank(), context.get_world_size())
    labels = LabelSet.open(training.run)
    trainer = Trainer(training, _engine(build_student(training, labels), training), labels, group)
    if (latest := ray.train.get_checkpoint()) is not None:
        with latest.as_directory() as folder:
            trainer.restore(Path(folder))
    with Progress(training.run, trainer.state.history) if group.rank == 0 else nullcontext() as progress:
        for _ in trainer.run(progress):
            _report(trainer)
    return trainer.state.history


def _engine(student: Student, training: DistillationConfig) -> Engine:
    """Return the engine that the settings select."""
    if stage := training.deepspeed_stage:
        return DeepSpeedEngine(student, training.weight_decay, training.clip, stage, training.device)
    options = {"find_unused_parameters": True, "broadcast_buffers": False}  # some objectives do not use the sense head
    return DDPEngine(
        student,
        training.weight_decay,
        training.clip,
        lambda student: prepare_model(student, parallel_strategy_kwargs=options),
    )


def _report(trainer: Trainer) -> None:
    """Report a checkpoint to Ray Train and wait until it is committed."""
    state, engine, is_first = trainer.state, trainer.engine, trainer.group.rank == 0
    with tempfile.TemporaryDirectory() as folder:
        trainer.save(Path(folder))
        if state.epoch == trainer.training.epochs:
            with engine.whole():
                if is_first:
                    restore_embeddings(trainer.student)
                    save_student(Path(folder, STUDENT), trainer.student)
        checkpoint = ray.train.Checkpoint.from_directory(folder) if is_first or engine.every_rank else None
        name = f"epoch_{state.epoch:05d}_step_{state.step:08d}"
        metrics = dict(state.history[-1]) if state.history else {}
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)
        # `report` may return before the checkpoint can be resumed from
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
