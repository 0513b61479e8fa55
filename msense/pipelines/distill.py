"""Distill a student: the stages from a dictionary and a text to labels and a student's folder.

The driver passes on paths, and never holds text, labels or embeddings.
"""

import logging
import os
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from msense.config.distill import DistillConfig
from msense.corpus import list_files
from msense.io import storage
from msense.pipelines.distill_inputs import DistillInputs, list_original_text, load_inputs
from msense.pipelines.dry_run import LabelTimer, time_teacher
from msense.pipelines.job import THREADS, run_job, training_dtype
from msense.pipelines.manifest import describe_distillation
from msense.run.folder import RunFolder, resolve_output
from msense.run.journal import timed
from msense.run.resume import finished
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import StageContext, run_stage
from msense.stages.embed import EmbedSettings
from msense.stages.label import (
    LabelSettings,
    LabelStage,
    SelectionStage,
    SelectionStats,
    are_finished,
    cut_label_partitions,
    label_stats,
)
from msense.stages.passages import PassageStage
from msense.stages.plan import PlanInput, PlanStage
from msense.stages.train import TrainStage, check_student
from msense.student import StudentSettings
from msense.training.distiller import DistillationConfig
from msense.training.label_dataset import LabelSet, label_size
from msense.training.losses import LossWeights

logger = logging.getLogger(__name__)
EXAMPLE_SOFT_TARGETS = 4  # in a dry run without --soft-targets


@dataclass
class Distillation:
    """A run in progress."""

    config: DistillConfig
    source: DistillInputs
    dtype: str
    context: StageContext


def distill_student(config: DistillConfig, executor: Executor | None = None) -> dict[str, Any]:
    """Label a text and distill a student from it, or resume an interrupted run.

    Args:
        config: all settings; `output` names the run folder.
        executor: where the work runs; by default what the settings select.

    Returns:
        The run's summary: `stages`, the stats of every stage; `driver_peak`, the driver's peak memory in bytes; and either
        `student`, the folder, or `estimate`, the result of a dry run.

    Raises:
        InputError: settings, dictionary, text or teacher are invalid.
        MsenseError: the run failed; the same command resumes it.

    Example:
        >>> summary = distill_student(DistillConfig(dictionary="run", student="static", output="student", local=True))
        >>> encoder = SenseEncoder.from_pretrained(summary["student"])
    """
    source = load_inputs(config)
    root = resolve_output(config.output)

    def stages(context: StageContext, dtype: str) -> dict[str, Any]:
        return _run_stages(Distillation(config, source, dtype, context))

    return run_job(config, root, executor, partial(describe_distillation, config, source), stages)


def _run_stages(job: Distillation) -> dict[str, Any]:
    """Run the stages that are not finished; return the summary."""
    config, context, run, executor = job.config, job.context, job.context.run, job.context.executor
    training = distillation_config(config, job.source, run, executor, job.dtype)
    if not storage.exists(run.student):
        executor.run(check_student, training)
    if config.dry_run or not are_finished(run, executor):
        text, blocks = _text(job)
        selection = SelectionStage(_settings(job, text), blocks)
        chosen = run_stage(selection, context)
        partitions = cut_label_partitions(selection.settings)
        storage.write_json(run.partitions, {"labels": len(partitions)})
        if config.dry_run:
            estimate = _estimate(job, chosen) | {"units": len(partitions)} | executor.resources.described()
            if config.time_teacher:
                arguments = {"settings": selection.settings}
                estimate["tokens_per_second"] = time_teacher(LabelTimer, arguments, partitions, executor)
            return {"stages": context.summary, "estimate": estimate}
        run_stage(LabelStage(selection.settings, partitions), context)
        labels = LabelSet.open(run.root)
    else:
        with timed(context.summary, "labels") as shown:
            labels = LabelSet.open(run.root)
            context.journal.add("labels", kept=len(labels.manifest.partitions), damaged=0, made=0)
            shown.update(asdict(label_stats(labels.manifest)))
    run_stage(TrainStage(run, training, labels, config.ship_senses), context)
    return {"stages": context.summary, "student": run.student}


def _text(job: Distillation) -> tuple[RunFolder, list[int]]:
    """Return the run folder with passages and plan, and the number of blocks of every passages file."""
    source, run = job.source, job.context.run
    if kept := _kept_text(source, job.context.executor):
        logger.info("labelling the passages of %s", kept[0].root)
        return kept
    files = list_files(job.config.corpus) if job.config.corpus else list_original_text(source)
    storage.write_text(run.tokenizer, source.tokenizer.to_str())
    reading = PassageStage(run, source.spec, files, source.corpus, job.config.on_bad_document)
    run_stage(reading, job.context)
    run_stage(
        PlanStage(PlanInput(run, source.spec, source.text, source.info.vocab_size, source.info.dim), reading.blocks),
        job.context,
    )
    return run, reading.blocks


def _kept_text(source: DistillInputs, executor: Executor) -> tuple[RunFolder, list[int]] | None:
    """Return the dictionary's run and its numbers of blocks, if its passages and plan are complete and unchanged."""
    if source.run is None:
        return None
    done = storage.read_json(source.run.finished) or {}
    run = RunFolder(source.run.root, done.get("made_of", ""))
    splits = len([name for name in storage.markers(run.passages) if name.endswith(".parquet")])
    files = [run.passages_file(number) for number in range(splits)]
    plan = [run.thresholds, run.duplicates] if source.text.dedup else [run.thresholds]
    passages = finished("passages of the dictionary", run, files, executor, repair=False)
    planned = finished("plan of the dictionary", run, plan, executor, repair=False)
    complete = [stats for stats in passages if stats is not None]
    wanted = done.get("stages", {}).get("passages", {}).get("passages")
    if len(complete) < len(passages) or None in planned or sum(stats["passages"] for stats in complete) != wanted:
        return None
    return run, [stats["blocks"] for stats in complete]


def _settings(job: Distillation, text: RunFolder) -> LabelSettings:
    """Return the settings of the tasks and actors that label."""
    source, config = job.source, job.config
    embed = EmbedSettings(
        teacher=source.teacher,
        info=source.info,
        dtype=job.dtype,
        device=job.context.executor.resources.device,
        store_dtype="float16",
        per_passage=source.text.per_passage,
        spec=source.spec,
        threads=THREADS,
    )
    return LabelSettings(
        run=job.context.run,
        text=text,
        embed=embed,
        dictionary=source.dictionary,
        fingerprint=source.fingerprint,
        pooling=source.config.pooling,
        normalize=source.config.normalize,
        metric=config.metric or source.config.metric,
        **config.model_dump(include={"pooled", "soft_targets", "temperature", "held_out", "train_tokens"}),
    )


def _estimate(job: Distillation, chosen: SelectionStats) -> Row:
    """Return the result of a dry run: what is labelled, and the bytes of each option."""
    passages, tokens, dim = chosen.passages, chosen.tokens, job.source.info.dim
    top = job.config.soft_targets or EXAMPLE_SOFT_TARGETS
    hard = label_size(passages, tokens, 0, 0)
    return {
        "passages": passages,
        "tokens": tokens,
        "labels_bytes": hard,
        "soft_targets": top,
        "soft_targets_bytes": label_size(passages, tokens, 0, top) - hard,
        "pooled_bytes": label_size(passages, tokens, dim, 0) - hard,
        "total_bytes": label_size(passages, tokens, dim if job.config.pooled else 0, job.config.soft_targets),
        "workers": job.context.executor.resources.actors,
        "device": job.context.executor.resources.device,
    }


def distillation_config(
    config: DistillConfig, source: DistillInputs, run: RunFolder, executor: Executor, dtype: str
) -> DistillationConfig:
    """Return the workers' settings; `dtype` is the teacher's."""
    weights: dict[str, Any] = dict(config.objective)
    optimizer = {
        "epochs",
        "batch_tokens",
        "accumulate",
        "schedule",
        "warmup",
        "weight_decay",
        "clip",
        "deepspeed_stage",
    }
    return DistillationConfig(
        **config.model_dump(include={*optimizer, "train_embeddings", "checkpoint_steps", "seed"}),
        run=run.root,
        dictionary=source.dictionary,
        teacher=source.teacher,
        revision=source.info.revision,
        teacher_dtype=dtype,
        student=StudentSettings(kind=config.student, heads=config.heads, seed=config.seed),
        mix=LossWeights(metric=config.metric, temperature=None if config.reference else config.temperature, **weights),
        lr=config.highest_rate,
        dtype=training_dtype(config.student_dtype, executor),
        device=executor.resources.device,
        threads=max(1, (os.cpu_count() or 1) // executor.resources.trainers),
    )
