"""Distill a student: the stages from a dictionary and a text to labels and a student's folder.

Runs on the driver, which passes on paths; it never holds text, labels or embeddings. Every stage keeps what an earlier run
finished, so that the same command resumes after any interruption.
"""

import logging
import os
from dataclasses import asdict, dataclass
from typing import Any

from msense.config.distill import DistillConfig
from msense.corpus import list_files
from msense.io import storage
from msense.pipelines.build import THREADS
from msense.pipelines.distill_inputs import DistillInputs, list_original_text, load_inputs
from msense.pipelines.dry_run import LabelTimer, time_teacher
from msense.pipelines.manifest import describe_distillation
from msense.run.folder import RunFolder, locked, remove_temp_files, resolve_output
from msense.run.journal import Journal, timed
from msense.run.manifest import check_manifest, inputs_hash
from msense.run.resume import finished
from msense.runtime import Executor, open_executor
from msense.runtime.executor import Row, peak_memory
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
from msense.teacher.body import resolve_dtype
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

    @property
    def run(self) -> RunFolder:
        """The run folder."""
        return self.context.run

    @property
    def executor(self) -> Executor:
        """Where the work runs."""
        return self.context.executor


def distill_student(config: DistillConfig) -> dict[str, Any]:
    """Label a text and distill a student from it, or resume an interrupted run.

    Args:
        config: all settings; `output` names the run folder.

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
    with locked(RunFolder(root)):
        executor = open_executor(local=config.local, workers=config.workers, gpus_per_actor=config.gpus_per_actor)
        device = executor.resources.device
        dtype = config.dtype
        if dtype == "auto":
            dtype = executor.run(resolve_dtype, dtype, device, device=device)
        manifest = describe_distillation(config, source, dtype, device, THREADS)
        run = RunFolder(root, inputs_hash(manifest))
        check_manifest(run, manifest)
        remove_temp_files(run)
        journal = Journal.begin(run, executor.resources.tasks)
        with journal.ending_with_errors():
            summary = _run_stages(Distillation(config, source, dtype, StageContext(run, executor, journal)))
        summary["driver_peak"] = peak_memory()
        storage.write_json(run.summary, summary)
        journal.end("dry run" if config.dry_run else "finished")
        remove_temp_files(run)
    return summary


def _run_stages(job: Distillation) -> dict[str, Any]:
    """Run the stages that are not finished; return the summary."""
    config, run, context = job.config, job.run, job.context
    training = distillation_config(config, job.source, run, job.executor, job.dtype)
    if not storage.exists(run.student):
        job.executor.run(check_student, training)
    if config.dry_run or not are_finished(run, job.executor):
        text, blocks = _text(job)
        selection = SelectionStage(_settings(job, text), blocks)
        chosen = run_stage(selection, context)
        partitions = cut_label_partitions(selection.settings)
        storage.write_json(run.partitions, {"labels": len(partitions)})
        if config.dry_run:
            estimate = _estimate(job, chosen) | {"units": len(partitions)} | job.executor.resources.described()
            if config.time_teacher:
                arguments = {"settings": selection.settings}
                estimate["tokens_per_second"] = time_teacher(LabelTimer, arguments, partitions, job.executor)
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
    source, run = job.source, job.run
    if kept := _kept_text(source, job.executor):
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
        revision=source.info.revision,
        fingerprint=source.info.fingerprint,
        layer=source.config.layer,
        dtype=job.dtype,
        device=job.executor.resources.device,
        store_dtype="float16",
        per_passage=source.text.per_passage,
        spec=source.spec,
        dim=source.info.dim,
        threads=THREADS,
    )
    return LabelSettings(
        run=job.run,
        text=text,
        embed=embed,
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
        "workers": job.executor.resources.actors,
        "device": job.executor.resources.device,
    }


def distillation_config(
    config: DistillConfig, source: DistillInputs, run: RunFolder, executor: Executor, dtype: str
) -> DistillationConfig:
    """Return the workers' settings; `dtype` is the teacher's."""
    student_dtype = config.student_dtype
    if student_dtype == "auto":
        device = executor.resources.device
        resolved = executor.run(resolve_dtype, "auto", device, device=device)
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
        device=executor.resources.device,
        threads=max(1, (os.cpu_count() or 1) // executor.resources.trainers),
    )
