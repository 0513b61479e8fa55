"""TODO"""

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import CheckpointConsistencyMode
from ray.train.torch import get_device, prepare_model

from msense.run.progress import Progress
from msense.training.engine import keep_freed_memory
from msense.training.finetuner import TEACHER, Finetuner, FinetuningConfig
from msense.training.group import ProcessGroup


def finetune_worker(given: dict[str, Any]) -> list[dict[str, float]]:
    """Fine-tune with the settings in `given["tuning"]`, a `Tuning`; return the metrics of all epochs."""
    tuning: FinetuningConfig = given["tuning"]
    torch.set_num_threads(tuning.threads)
    keep_freed_memory()
    if tuning.device == "cuda":
        torch.cuda.set_device(get_device())
    context = ray.train.get_context()
    group = ProcessGroup(context.get_world_rank(), context.get_world_size())
    tuner = Finetuner(tuning, group, prepare_model)
    if (latest := ray.train.get_checkpoint()) is not None:
        with latest.as_directory() as folder:
            tuner.restore(Path(folder))
    with Progress(tuning.run, tuner.history) if group.rank == 0 else nullcontext() as progress:
        for _ in tuner.run(progress):
            _report(tuner)
    return tuner.history


def _report(tuner: Finetuner) -> None:
    """Report a checkpoint to Ray Train, and wait until a restart would use it."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if tuner.group.rank == 0:
            tuner.save(Path(folder))
            if len(tuner.history) == tuner.config.epochs:
                tuner.save_teacher(Path(folder, TEACHER))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        name = f"epoch_{len(tuner.history):05d}"
        ray.train.report(dict(tuner.history[-1]), checkpoint=checkpoint, checkpoint_dir_name=name)
        # `report` returns before the checkpoint is committed
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
