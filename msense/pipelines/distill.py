"""Distill a student: a job that labels a text, then one that trains on the labels.

Labels are in a run folder of their own, named after what they were made of, which students share. The driver passes on paths,
and never holds text, labels or embeddings.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from msense.config.distill import DistillConfig
from msense.corpus import display_uri, list_files
from msense.corpus.spans import MIN_PASSAGE
from msense.errors import InputError, MsenseError
from msense.io import storage
from msense.io.extras import require
from msense.pipelines.distill_inputs import DistillInputs, list_original_text, load_inputs
from msense.pipelines.dry_run import estimate_resources
from msense.pipelines.job import THREADS, fingerprints, make_manifest, run_job, training_dtype
from msense.run.folder import RunFolder, resolve_output
from msense.run.journal import timed
from msense.run.manifest import inputs_hash
from msense.run.resume import finished
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import StageContext, run_stage
from msense.stages.embedding_store import Partition, cut_partitions
from msense.stages.label import LabelStage, are_finished, label_stats
from msense.stages.label_texts import (
    LabelSettings,
    QueryStage,
    SelectionStats,
    choose_passages,
    query_partitions,
    sample_spans,
)
from msense.stages.passages import PassageStage, PassageStats
from msense.stages.plan import PlanInput, PlanStage
from msense.stages.reading import EmbedSettings
from msense.stages.train import TrainStage, check_student
from msense.student import StudentSettings
from msense.teacher.batching import TOKEN_BUDGET
from msense.training.distiller import DistillationConfig
from msense.training.label_dataset import LabelSet, label_size
from msense.training.losses import LossWeights

logger = logging.getLogger(__name__)
EXAMPLE_SOFT_TARGETS = 4  # in a dry run without --soft-targets
_COLUMNS = ("text_column", "id_column", "prompt_column")
TEXTS_SINCE = 3  # version of the stages whose passages files have texts


def distill_student(config: DistillConfig, executor: Executor | None = None) -> dict[str, Any]:
    """Label a text and distill a student from it, or resume an interrupted run; finished labels are used again.

    Returns the run's summary, as of a build, with either `student` and `labels`, the folders, or `estimate`, the result of a
    dry run.

    Raises:
        InputError: settings, dictionary, text or teacher are invalid.
        MsenseError: the run failed; the same command resumes it.

    Example:
        >>> summary = distill_student(DistillConfig(dictionary="run", student="static", output="student", local=True))
        >>> encoder = SenseEncoder.from_pretrained(summary["student"])
    """
    require("train", "distilling a student")
    source = load_inputs(config)
    if "spans" in config.model_fields_set and config.spans and source.spec.body_length < MIN_PASSAGE:
        raise InputError(
            f"a passage has at most {source.spec.body_length} tokens of text, and spans are taken of passages of {MIN_PASSAGE} "
            "or more: build a dictionary with a larger --max-length, or give --spans none"
        )
    root = resolve_output(config.output)
    inputs = _label_inputs(config, source) | {"training": config.of_training()}
    inputs.pop("pins")  # of labels
    if _has_own_labels(RunFolder(root)):
        inputs["config"].pop("spans")
    return run_job(config, root, executor, inputs, source.teacher, partial(_run_stages, config, source))


def _has_own_labels(run: RunFolder) -> bool:
    """Return whether the run of a student has finished labels in itself, as those of older versions."""
    return storage.exists(run.label_manifest)


def _labels_of(run: RunFolder) -> RunFolder | None:
    """Return the folder of the labels of a finished student, which an older version may have made; None if it is gone."""
    place = storage.read_json(run.labels_place) if storage.exists(run.student) else None
    folder = place["folder"] if place else ""
    manifest = storage.read_json(RunFolder(folder).label_manifest) if folder else None
    return RunFolder(folder, manifest["made_of"]) if manifest else None


def _label_inputs(config: DistillConfig, source: DistillInputs) -> dict[str, Any]:
    """Return the manifest of labels without what depends on the executor."""
    settings = {**config.of_labels(), **{f"text.{name}": value for name, value in source.text_settings.items()}}
    columns = {f"queries.{name}": getattr(config, name) for name in _COLUMNS}
    pins = {"dtype": source.pins["dtype"] if config.dtype == "auto" else config.dtype} if source.pins else {}
    pins |= {name: value for name, value in source.pins.items() if name == "token_budget"}
    pins |= {"embeddings_dtype": "int8"} if source.quantized else {}
    return {
        "config": settings | (columns if source.queries else {}),
        "corpus": source.corpus,
        "inputs": source.inputs | {f"queries: {name}": value for name, value in fingerprints(source.queries).items()},
        "teacher": asdict(source.info),
        "dictionary": source.fingerprint,
        "pins": pins,
    }


def labels_folder(config: DistillConfig, source: DistillInputs, executor: Executor) -> RunFolder:
    """Return the run folder of labels made of these inputs."""
    name = inputs_hash(make_manifest(config, executor, _label_inputs(config, source)))
    home = source.home or RunFolder(resolve_output(config.output))
    parent = home.labels if config.labels is None else resolve_output(config.labels, "--labels")
    return RunFolder(storage.join(parent, name[:16]), name)


def _run_stages(config: DistillConfig, source: DistillInputs, context: StageContext, dtype: str) -> dict[str, Any]:
    """Run the stages that are not finished; return the summary."""
    run, executor = context.run, context.executor
    training = distillation_config(config, source, run, executor, dtype)
    if not storage.exists(run.student):
        executor.run(check_student, training)
    own = _has_own_labels(run) and not config.dry_run
    folder = run if own else _labels_of(run) or labels_folder(config, source, executor)
    if not own and not config.dry_run:
        storage.write_json(run.labels_place, {"folder": folder.root})
    if config.dry_run or not are_finished(folder, executor):
        if own:
            raise InputError(
                f"the labels in {run.labels}, of an older version of msense, are damaged: give another --output"
            )
        made = _make_labels(config, source, folder, executor)
        context.summary |= made["stages"]
        if config.dry_run:
            return {"stages": context.summary, "estimate": made["estimate"]}
        labels = LabelSet.open(folder.root)
    else:
        logger.info("the labels in %s are finished: nothing is read by the teacher", folder.root)
        with timed(context.summary, "labels") as shown:
            labels = LabelSet.open(folder.root)
            context.journal.add("labels", kept=len(labels.manifest.partitions), damaged=0, made=0)
            shown.update(asdict(label_stats(labels.manifest)))
    run_stage(TrainStage(run, training, labels, config.ship_senses, config.ship_dtype), context)
    return {"stages": context.summary, "student": run.student, "labels": folder.root}


def _make_labels(config: DistillConfig, source: DistillInputs, folder: RunFolder, executor: Executor) -> dict[str, Any]:
    """Run the job of the labels; return its summary."""
    inputs, stages = _label_inputs(config, source), partial(_run_label_stages, config, source)
    with _another_place(folder):
        return run_job(config, folder.root, executor, inputs, source.teacher, stages, "--labels")


@contextmanager
def _another_place(folder: RunFolder) -> Iterator[None]:
    """Name the remedy where this user may not write labels."""
    try:
        yield
    except (MsenseError, PermissionError) as error:
        denied = any(isinstance(one, PermissionError) for one in (error, error.__cause__))
        if not denied or display_uri(folder.root) not in str(error):
            raise
        raise MsenseError(
            f"{error}\nThe labels are written to {folder.root}: give another folder with --labels"
        ) from error


def _run_label_stages(
    config: DistillConfig, source: DistillInputs, context: StageContext, dtype: str
) -> dict[str, Any]:
    """Run the stages of labels that are not finished; return the summary."""
    executor = context.executor
    storage.write_text(context.run.tokenizer, source.tokenizer.to_str())
    text, blocks = _text(config, source, context)
    settings, chosen = choose_passages(_label_settings(config, source, context, dtype, text), blocks, context)
    partitions = cut_partitions(text.blocks, source.info.dim)
    queries, counted = _queries(config, source, context, len(partitions))
    storage.write_json(context.run.partitions, {"labels": len(partitions) + len(queries)})
    if config.dry_run:
        estimate = _estimate(settings, chosen, partitions, counted, executor)
        estimate |= estimate_resources(executor, text, settings.embed, partitions, timed=config.time_teacher)
        return {"stages": context.summary, "estimate": estimate}
    run_stage(LabelStage(settings, partitions + queries), context)
    return {"stages": context.summary, "labels": context.run.root}


def _text(config: DistillConfig, source: DistillInputs, context: StageContext) -> tuple[RunFolder, list[int]]:
    """Return the run folder with passages and plan, and the number of blocks of every passages file."""
    if kept := _kept_text(config, source, context.executor):
        logger.info("labelling the passages of %s", kept[0].root)
        return kept
    run, info = context.run, source.info
    files = list_files(config.corpus) if config.corpus else list_original_text(source)
    reading = PassageStage(run, source.spec, files, source.corpus, config.on_bad_document)
    run_stage(reading, context)
    planning = PlanInput(run, source.spec, source.text, info.vocab_size, info.dim)
    run_stage(PlanStage(planning, reading.blocks), context)
    return run, reading.blocks


def _kept_text(config: DistillConfig, source: DistillInputs, executor: Executor) -> tuple[RunFolder, list[int]] | None:
    """Return the dictionary's run and its numbers of blocks, if its passages and plan are complete and unchanged."""
    if source.run is None or (config.spans and source.pins.get("stages", 0) < TEXTS_SINCE):
        return None
    done = storage.read_json(source.run.finished) or {}
    run = RunFolder(source.run.root, done.get("made_of", ""))
    splits = len([name for name in storage.markers(run.passages) if name.endswith(".parquet")])
    files = [run.passages_file(number) for number in range(splits)]
    plan = [run.thresholds, run.blocks] + ([run.duplicates] if source.text.dedup else [])
    passages = finished("passages of the dictionary", run, files, executor)
    planned = finished("plan of the dictionary", run, plan, executor)
    complete = [stats for stats in passages if stats is not None]
    wanted = done.get("stages", {}).get("passages", {}).get("passages")
    if len(complete) < len(passages) or None in planned or sum(stats["passages"] for stats in complete) != wanted:
        return None
    return run, [stats["blocks"] for stats in complete]


def _queries(
    config: DistillConfig, source: DistillInputs, context: StageContext, first: int
) -> tuple[list[Partition], PassageStats | None]:
    """Read the queries, if any; return their partitions, numbered from `first`."""
    if not source.queries:
        return [], None
    run = RunFolder(context.run.queries, context.run.inputs_hash)
    storage.write_text(run.tokenizer, source.tokenizer.to_str())
    spec = replace(source.spec, stride=0, dedup=False, sample=1.0)
    spec = replace(spec, **{name: getattr(config, name) for name in _COLUMNS})
    reading = QueryStage(run, spec, source.queries, list(map(display_uri, config.queries)), config.on_bad_document)
    stats = run_stage(reading, context)
    return query_partitions(reading.blocks, first), stats


def _label_settings(
    config: DistillConfig, source: DistillInputs, context: StageContext, dtype: str, text: RunFolder
) -> LabelSettings:
    """Return the settings of the tasks and actors that label."""
    own_prompts = source.spec.prompt_column is not None or config.prompt_column is not None
    embed = EmbedSettings(
        teacher=source.teacher,
        info=source.info,
        dtype=dtype,
        device=context.executor.resources.device,
        store_dtype=source.config.dtype if source.config.dtype != "int8" else "float16",
        vector_dim=source.vector_dim,
        per_passage=source.text.per_passage,
        spec=source.spec,
        token_budget=source.pins.get("token_budget", TOKEN_BUDGET[context.executor.resources.device]),
        quantized=source.quantized,
        ranks=context.executor.resources.ranks,
        offload=context.executor.resources.offload,
        threads=THREADS,
    )
    return LabelSettings(
        run=context.run,
        text=text,
        embed=embed,
        reads_kept=text != context.run
        and (dtype, embed.ranks) == (source.pins.get("dtype"), source.pins.get("ranks", 1)),
        dictionary=source.dictionary,
        fingerprint=source.fingerprint,
        metric=config.metric or source.config.metric,
        skips=own_prompts and not source.info.pools_all,
        **config.model_dump(include={"pooled", "soft_targets", "temperature", "held_out", "train_tokens", "spans"}),
    )


def _estimate(
    settings: LabelSettings,
    chosen: SelectionStats,
    partitions: list[Partition],
    queries: PassageStats | None,
    executor: Executor,
) -> Row:
    """Return what a dry run reports: what is labelled, what the teacher reads, and the bytes of each option."""
    kinds = sample_spans(settings, partitions, chosen.tokens, executor) if settings.spans else {}
    kinds |= {"query": {"spans": queries.passages, "tokens": queries.tokens}} if queries else {}
    extra = [sum(kind[name] for kind in kinds.values()) for name in ("spans", "tokens")]
    counts = (chosen.passages + extra[0], chosen.tokens + extra[1])
    files = storage.markers(settings.text.embeddings) if settings.reads_kept else set()
    names = [settings.text.embeddings_file(partition.number).rpartition("/")[2] for partition in partitions]
    needed = sum(partition.tokens for partition in partitions)
    kept = sum(partition.tokens for partition, name in zip(partitions, names, strict=True) if name in files)
    top, dim = settings.soft_targets or EXAMPLE_SOFT_TARGETS, settings.embed.vector_dim
    hard = label_size(*counts, 0, 0)
    return {
        "passages": chosen.passages,
        "tokens": chosen.tokens,
        "kinds": kinds,
        "forwarded": chosen.tokens - round(kept * min(1, chosen.tokens / max(1, needed))) + extra[1],
        "labels_bytes": hard,
        "soft_targets": top,
        "soft_targets_bytes": label_size(*counts, 0, top) - hard,
        "pooled_bytes": label_size(*counts, dim, 0) - hard,
        "total_bytes": label_size(*counts, dim if settings.pooled else 0, settings.soft_targets),
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
        student=StudentSettings(
            kind=config.student, heads=config.heads, seed=config.seed, pooling=config.student_pooling
        ),
        mix=LossWeights(metric=config.metric, temperature=None if config.reference else config.temperature, **weights),
        lr=config.highest_rate,
        dtype=training_dtype(config.student_dtype, executor),
        device=executor.resources.device,
        threads=max(1, (os.cpu_count() or 1) // executor.resources.trainers),
    )
