"""Distill a student: the stages from a dictionary and a text to labels and a student's folder.

The driver passes on paths, and never holds text, labels or embeddings.
"""

import logging
import os
from dataclasses import asdict
from functools import partial
from typing import Any

from msense.config.distill import DistillConfig
from msense.corpus import list_files
from msense.io import storage
from msense.pipelines.distill_inputs import DistillInputs, list_original_text, load_inputs
from msense.pipelines.dry_run import estimate_resources
from msense.pipelines.job import THREADS, run_job, training_dtype
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
    SelectionStats,
    are_finished,
    choose_passages,
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


def distill_student(config: DistillConfig, executor: Executor | None = None) -> dict[str, Any]:
    """Label a text and distill a student from it, or resume an interrupted run.

    Returns the run's summary, as of a build, with either `student`, the folder, or `estimate`, the result of a dry run.

    Raises:
        InputError: settings, dictionary, text or teacher are invalid.
        MsenseError: the run failed; the same command resumes it.

    Example:
        >>> summary = distill_student(DistillConfig(dictionary="run", student="static", output="student", local=True))
        >>> encoder = SenseEncoder.from_pretrained(summary["student"])
    """
    source = load_inputs(config)
    manifest = {  # like that of a build, plus `training`, on which no label depends
        "config": {**config.of_labels(), **{f"text.{name}": value for name, value in source.text_settings.items()}},
        "corpus": source.corpus,
        "inputs": source.inputs,
        "teacher": asdict(source.info),
        "dictionary": source.fingerprint,
        "training": config.of_training(),
    }
    run = resolve_output(config.output)
    return run_job(config, run, executor, manifest, source.teacher, partial(_run_stages, config, source))


def _run_stages(config: DistillConfig, source: DistillInputs, context: StageContext, dtype: str) -> dict[str, Any]:
    """Run the stages that are not finished; return the summary."""
    run, executor = context.run, context.executor
    training = distillation_config(config, source, run, executor, dtype)
    if not storage.exists(run.student):
        executor.run(check_student, training)
    if config.dry_run or not are_finished(run, executor):
        text, blocks = _text(config, source, context)
        settings = _label_settings(config, source, context, dtype, text)
        settings, chosen = choose_passages(settings, blocks, context)
        partitions = cut_label_partitions(settings)
        storage.write_json(run.partitions, {"labels": len(partitions)})
        if config.dry_run:
            estimate = _estimate(config, chosen, source.pooled_dim)
            estimate |= estimate_resources(executor, text, settings.embed, partitions, timed=config.time_teacher)
            return {"stages": context.summary, "estimate": estimate}
        run_stage(LabelStage(settings, partitions), context)
        labels = LabelSet.open(run.root)
    else:
        with timed(context.summary, "labels") as shown:
            labels = LabelSet.open(run.root)
            context.journal.add("labels", kept=len(labels.manifest.partitions), damaged=0, made=0)
            shown.update(asdict(label_stats(labels.manifest)))
    run_stage(TrainStage(run, training, labels, config.ship_senses), context)
    return {"stages": context.summary, "student": run.student}


def _text(config: DistillConfig, source: DistillInputs, context: StageContext) -> tuple[RunFolder, list[int]]:
    """Return the run folder with passages and plan, and the number of blocks of every passages file."""
    if kept := _kept_text(source, context.executor):
        logger.info("labelling the passages of %s", kept[0].root)
        return kept
    run, info = context.run, source.info
    files = list_files(config.corpus) if config.corpus else list_original_text(source)
    storage.write_text(run.tokenizer, source.tokenizer.to_str())
    reading = PassageStage(run, source.spec, files, source.corpus, config.on_bad_document)
    run_stage(reading, context)
    planning = PlanInput(run, source.spec, source.text, info.vocab_size, info.dim)
    run_stage(PlanStage(planning, reading.blocks), context)
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
    passages = finished("passages of the dictionary", run, files, executor)
    planned = finished("plan of the dictionary", run, plan, executor)
    complete = [stats for stats in passages if stats is not None]
    wanted = done.get("stages", {}).get("passages", {}).get("passages")
    if len(complete) < len(passages) or None in planned or sum(stats["passages"] for stats in complete) != wanted:
        return None
    return run, [stats["blocks"] for stats in complete]


def _label_settings(
    config: DistillConfig, source: DistillInputs, context: StageContext, dtype: str, text: RunFolder
) -> LabelSettings:
    """Return the settings of the tasks and actors that label."""
    embed = EmbedSettings(
        teacher=source.teacher,
        info=source.info,
        dtype=dtype,
        device=context.executor.resources.device,
        store_dtype="float16",
        per_passage=source.text.per_passage,
        spec=source.spec,
        threads=THREADS,
    )
    return LabelSettings(
        run=context.run,
        text=text,
        embed=embed,
        dictionary=source.dictionary,
        fingerprint=source.fingerprint,
        pooled_dim=source.pooled_dim,
        metric=config.metric or source.config.metric,
        **config.model_dump(include={"pooled", "soft_targets", "temperature", "held_out", "train_tokens"}),
    )


def _estimate(config: DistillConfig, chosen: SelectionStats, dim: int) -> Row:
    """Return what a dry run reports: what is labelled, and the bytes of each option."""
    counts = (chosen.passages, chosen.tokens)
    top = config.soft_targets or EXAMPLE_SOFT_TARGETS
    hard = label_size(*counts, 0, 0)
    return {
        "passages": chosen.passages,
        "tokens": chosen.tokens,
        "labels_bytes": hard,
        "soft_targets": top,
        "soft_targets_bytes": label_size(*counts, 0, top) - hard,
        "pooled_bytes": label_size(*counts, dim, 0) - hard,
        "total_bytes": label_size(*counts, dim if config.pooled else 0, config.soft_targets),
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
        "checkpoint_steps",
    }
    return DistillationConfig(
        **config.model_dump(include={*optimizer, "train_embeddings", "deepspeed_stage", "seed"}),
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
