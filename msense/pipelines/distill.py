"""A distillation: a dictionary and a text in, labels and a student out, by way of files in the run folder.

Runs on the driver: it hands over paths and never holds text, labels or embeddings. Each stage leaves out what an earlier
run has finished, so the same command goes on after any crash.
"""

import logging
import os
from dataclasses import dataclass, field
from typing import Any

from msense.config.distill import DistillConfig
from msense.corpus import list_files
from msense.errors import InputError
from msense.io import storage
from msense.pipelines.build import THREADS
from msense.pipelines.distill_inputs import DistillInputs, list_original_text, load_inputs
from msense.pipelines.dry_run import LabelTimer, time_teacher
from msense.pipelines.manifest import describe_distillation
from msense.run.folder import RunFolder, locked, remove_temp_files, resolve_output
from msense.run.journal import Journal, timed
from msense.run.manifest import check_manifest, inputs_hash
from msense.run.resume import finished
from msense.runtime.executor import peak_memory
from msense.runtime.ray_executor import connect, run_task
from msense.runtime.resources import Resources
from msense.stages.embed import EmbedSettings
from msense.stages.label import (
    LabelSettings,
    are_finished,
    cut_label_partitions,
    label_stats,
    make_labels,
    select_passages,
)
from msense.stages.passages import make_passages
from msense.stages.plan import PlanInput, make_plan
from msense.stages.train import check_student, train
from msense.student import StudentSettings
from msense.teacher.body import resolve_dtype
from msense.training.distiller import DistillationConfig
from msense.training.label_dataset import LabelSet, label_size
from msense.training.losses import LossWeights

logger = logging.getLogger(__name__)
TOLD_SOFT_TARGETS = 4  # of a dry run that is not told how many


@dataclass
class Distillation:
    """A run under way: its settings, and what the stages have told so far."""

    config: DistillConfig
    source: DistillInputs
    run: RunFolder
    resources: Resources
    dtype: str
    journal: Journal
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)


def distill_student(config: DistillConfig) -> dict[str, Any]:
    """Label a text and distill a student from it, or go on with a run that was cut off.

    Args:
        config: all settings; `output` names the run folder.

    Returns:
        The run's summary: facts of every stage, the driver's peak memory in bytes (`driver_peak`), and either `student`,
        the folder, or `estimate`, what a dry run found.

    Raises:
        BadInput: settings, dictionary, text or teacher that do not work.
        MsenseError: the run failed; the same command goes on from what is finished.
    """
    source = load_inputs(config)
    root = resolve_output(config.output)
    with locked(RunFolder(root)):
        resources = connect(config.workers, config.gpus_per_actor)
        dtype = config.dtype
        if dtype == "auto":
            dtype = run_task(resolve_dtype, dtype, resources.device, device=resources.device)
        manifest = describe_distillation(config, source, dtype, resources.device, THREADS)
        run = RunFolder(root, inputs_hash(manifest))
        check_manifest(run, manifest)
        remove_temp_files(run)
        journal = Journal.begin(run, resources.tasks)
        with journal.ending_with_errors():
            summary = _run_stages(Distillation(config, source, run, resources, dtype, journal))
        summary["driver_peak"] = peak_memory()
        storage.write_json(run.summary, summary)
        journal.end("dry run" if config.dry_run else "finished")
        remove_temp_files(run)
    return summary


def _run_stages(job: Distillation) -> dict[str, Any]:
    """Run what is not done yet."""
    training = distillation_config(job.config, job.source, job.run, job.resources, job.dtype)
    if not storage.exists(job.run.student):
        run_task(check_student, training)
    if job.config.dry_run or not are_finished(job.run, job.resources):
        text, blocks = _text(job)
        with timed(job.stages, "choosing passages") as stats:
            settings, chosen = select_passages(_settings(job, text), blocks, job.resources)
            stats.update(chosen)
            if not chosen["tokens"]:
                raise InputError("no passage of this text is to be labelled: give other text, or --train-tokens")
        partitions = cut_label_partitions(settings)
        storage.write_json(job.run.partitions, {"labels": len(partitions)})
        if job.config.dry_run:
            arguments = {"settings": settings}
            timer = (LabelTimer, arguments, partitions, job.resources) if job.config.time_teacher else None
            found = _estimate(job, chosen) | {"units": len(partitions)} | job.resources.described()
            found |= {"tokens_per_second": time_teacher(*timer)} if timer else {}
            return {"stages": job.stages, "estimate": found}
        with timed(job.stages, "labels") as stats:
            stats.update(make_labels(settings, partitions, job.resources, job.journal))
        labels = LabelSet.open(job.run.root)
    else:
        with timed(job.stages, "labels") as stats:
            labels = LabelSet.open(job.run.root)
            job.journal.add("labels", kept=len(labels.manifest.partitions), damaged=0, made=0)
            stats.update(label_stats(labels.manifest))
    with timed(job.stages, "training") as stats:
        stats.update(train(job.config, training, job.run, job.resources, labels))
    return {"stages": job.stages, "student": job.run.student}


def _text(job: Distillation) -> tuple[RunFolder, list[int]]:
    """Return the run folder that holds passages and plan, and the number of blocks of every passages file."""
    source, run = job.source, job.run
    if kept := _kept_text(source, job.resources):
        logger.info("the passages of %s are labelled", kept[0].root)
        return kept
    files = list_files(job.config.corpus) if job.config.corpus else list_original_text(source)
    with timed(job.stages, "passages") as stats:
        storage.write_text(run.tokenizer, source.tokenizer.to_str())
        spec = source.info.passage_spec(source.build)
        found, blocks = make_passages(run, source.build, spec, files, job.resources, job.journal)
        stats.update(found)
    with timed(job.stages, "plan") as stats:
        given = PlanInput(run, source.info, source.build)
        stats.update(make_plan(given, blocks, job.resources, job.journal))
    return run, blocks


def _kept_text(source: DistillInputs, resources: Resources) -> tuple[RunFolder, list[int]] | None:
    """Return the run that made the dictionary and its numbers of blocks, if passages and plan are there, every byte."""
    if source.run is None:
        return None
    done = storage.read_json(source.run.finished) or {}
    run = RunFolder(source.run.root, done.get("made_of", ""))
    splits = len([name for name in storage.markers(run.passages) if name.endswith(".parquet")])
    files = [run.passages_file(number) for number in range(splits)]
    plan = [run.thresholds, run.duplicates] if source.build.dedup else [run.thresholds]
    found = finished("passages of the dictionary", run, files, resources, repair=False)
    planned = finished("plan of the dictionary", run, plan, resources, repair=False)
    whole = [stats for stats in found if stats is not None]
    wanted = done.get("stages", {}).get("passages", {}).get("passages")
    if len(whole) < len(found) or None in planned or sum(stats["passages"] for stats in whole) != wanted:
        return None
    return run, [stats["blocks"] for stats in whole]


def _settings(job: Distillation, text: RunFolder) -> LabelSettings:
    """Return what the tasks and actors of the labels are made with."""
    source, config = job.source, job.config
    gather = EmbedSettings(
        teacher=source.teacher,
        revision=source.info.revision,
        fingerprint=source.info.fingerprint,
        layer=source.config.layer,
        dtype=job.dtype,
        device=job.resources.device,
        store_dtype="float16",
        per_passage=source.build.per_passage,
        spec=source.info.passage_spec(source.build),
        dim=source.info.dim,
        threads=THREADS,
    )
    return LabelSettings(
        run=job.run,
        text=text,
        gather=gather,
        dictionary=source.dictionary,
        fingerprint=source.fingerprint,
        pooling=source.config.pooling,
        normalize=source.config.normalize,
        pooled=config.pooled,
        soft_targets=config.soft_targets,
        metric=config.metric or source.config.metric,
        temperature=config.temperature,
        held_out=config.held_out,
        train_tokens=config.train_tokens,
    )


def _estimate(job: Distillation, chosen: dict[str, int]) -> dict[str, Any]:
    """Return what a dry run tells: what is labelled, and the bytes with each option."""
    passages, tokens, dim = chosen["passages"], chosen["tokens"], job.source.info.dim
    top = job.config.soft_targets or TOLD_SOFT_TARGETS
    hard = label_size(passages, tokens, 0, 0)
    return {
        "passages": passages,
        "tokens": tokens,
        "labels_bytes": hard,
        "soft_targets": top,
        "soft_targets_bytes": label_size(passages, tokens, 0, top) - hard,
        "pooled_bytes": label_size(passages, tokens, dim, 0) - hard,
        "total_bytes": label_size(passages, tokens, dim if job.config.pooled else 0, job.config.soft_targets),
        "workers": job.resources.actors,
        "device": job.resources.device,
    }


def distillation_config(
    config: DistillConfig, source: DistillInputs, run: RunFolder, resources: Resources, dtype: str
) -> DistillationConfig:
    """Return the workers' settings; `dtype` is the teacher's."""
    student_dtype = config.student_dtype
    if student_dtype == "auto":
        resolved = run_task(resolve_dtype, "auto", resources.device, device=resources.device)
        student_dtype = "bfloat16" if resolved == "bfloat16" else "float32"
    weights: dict[str, Any] = dict(config.objective)
    return DistillationConfig(
        run=run.root,
        dictionary=source.dictionary,
        teacher=source.teacher,
        revision=source.info.revision,
        teacher_dtype=dtype,
        student=StudentSettings(kind=config.student, heads=config.heads, seed=config.seed),
        mix=LossWeights(metric=config.metric, temperature=None if config.reference else config.temperature, **weights),
        train_embeddings=config.train_embeddings,
        epochs=config.epochs,
        batch_tokens=config.batch_tokens,
        accumulate=config.accumulate,
        lr=config.highest_rate,
        schedule=config.schedule,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
        dtype=student_dtype,
        seed=config.seed,
        deepspeed_stage=config.deepspeed_stage,
        checkpoint_steps=config.checkpoint_steps,
        device=resources.device,
        threads=max(1, (os.cpu_count() or 1) // resources.trainers),
    )
