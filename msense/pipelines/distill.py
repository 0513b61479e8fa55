"""A distillation: a dictionary and a text in, labels and a student out, by way of files in the run folder.

Runs on the driver: it hands over paths and never holds text, labels or embeddings. Each stage leaves out what an earlier
run has finished, so the same command goes on after any crash.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

from msense import storage
from msense.build import THREADS
from msense.corpus import list_files
from msense.distill import train, training_of, try_student
from msense.distill_config import DistillConfig
from msense.errors import BadInput
from msense.estimate import LabelTimer, time_teacher
from msense.label_set import LabelSet, label_bytes
from msense.label_source import Source, find_source, text_again
from msense.labels import LabelSettings, are_finished, choose, label_facts, label_units, make_labels
from msense.manifest import check_manifest, describe_distillation, made_of
from msense.occurrences import GatherSettings
from msense.passages import make_passages
from msense.plan import PlanInput, make_plan
from msense.resume import Journal, finished, timed
from msense.run_folder import RunFolder, lasting, locked, sweep
from msense.runtime import Resources, connect, peak_memory, run_task
from msense.teacher import resolve_dtype

logger = logging.getLogger(__name__)

TOLD_SOFT_TARGETS = 4  # of a dry run that is not told how many


@dataclass
class Distillation:
    """A run under way: its settings, and what the stages have told so far."""

    config: DistillConfig
    source: Source
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
    source = find_source(config)
    root = lasting(config.output)
    with locked(RunFolder(root)):
        resources = connect(config.workers, config.gpus_per_actor)
        dtype = config.dtype
        if dtype == "auto":
            dtype = run_task(resolve_dtype, dtype, resources.device, device=resources.device)
        manifest = describe_distillation(config, source, dtype, resources.device, THREADS)
        run = RunFolder(root, made_of(manifest))
        check_manifest(run, manifest)
        sweep(run)
        journal = Journal.begin(run, resources.tasks)
        with journal.ending_with_errors():
            summary = _run_stages(Distillation(config, source, run, resources, dtype, journal))
        summary["driver_peak"] = peak_memory()
        storage.write_json(run.summary, summary)
        journal.end("dry run" if config.dry_run else "finished")
        sweep(run)
    return summary


def _run_stages(job: Distillation) -> dict[str, Any]:
    """Run what is not done yet."""
    training = training_of(job.config, job.source, job.run, job.resources, job.dtype)
    if not storage.exists(job.run.student):
        run_task(try_student, training)
    if job.config.dry_run or not are_finished(job.run, job.resources):
        text, blocks = _text(job)
        with timed(job.stages, "choosing passages") as facts:
            settings, chosen = choose(_settings(job, text), blocks, job.resources)
            facts.update(chosen)
            if not chosen["tokens"]:
                raise BadInput("no passage of this text is to be labelled: give other text, or --train-tokens")
        units = label_units(settings)
        storage.write_json(job.run.units, {"labels": len(units)})
        if job.config.dry_run:
            arguments = {"settings": settings}
            timer = (LabelTimer, arguments, units, job.resources) if job.config.time_teacher else None
            found = _estimate(job, chosen) | {"units": len(units)} | job.resources.described()
            found |= {"tokens_per_second": time_teacher(*timer)} if timer else {}
            return {"stages": job.stages, "estimate": found}
        with timed(job.stages, "labels") as facts:
            facts.update(make_labels(settings, units, job.resources, job.journal))
        labels = LabelSet.open(job.run.root)
    else:
        with timed(job.stages, "labels") as facts:
            labels = LabelSet.open(job.run.root)
            job.journal.add("labels", kept=len(labels.manifest.units), damaged=0, made=0)
            facts.update(label_facts(labels.manifest))
    with timed(job.stages, "training") as facts:
        facts.update(train(job.config, training, job.run, job.resources, labels))
    return {"stages": job.stages, "student": job.run.student}


def _text(job: Distillation) -> tuple[RunFolder, list[int]]:
    """Return the run folder that holds passages and plan, and the number of blocks of every passages file."""
    source, run = job.source, job.run
    if kept := _kept_text(source, job.resources):
        logger.info("the passages of %s are labelled", kept[0].root)
        return kept
    files = list_files(job.config.corpus) if job.config.corpus else text_again(source)
    with timed(job.stages, "passages") as facts:
        storage.write_text(run.tokenizer, source.tokenizer.to_str())
        spec = source.info.passage_spec(source.build)
        found, blocks = make_passages(run, source.build, spec, files, job.resources, job.journal)
        facts.update(found)
    with timed(job.stages, "plan") as facts:
        given = PlanInput(run, source.info, source.build)
        facts.update(make_plan(given, blocks, job.resources, job.journal))
    return run, blocks


def _kept_text(source: Source, resources: Resources) -> tuple[RunFolder, list[int]] | None:
    """Return the run that made the dictionary and its numbers of blocks, if passages and plan are there, every byte."""
    if source.run is None:
        return None
    done = storage.read_json(source.run.finished) or {}
    run = RunFolder(source.run.root, done.get("made_of", ""))
    pieces = len([name for name in storage.markers(run.passages) if name.endswith(".parquet")])
    files = [run.passages_file(number) for number in range(pieces)]
    plan = [run.thresholds, run.duplicates] if source.build.dedup else [run.thresholds]
    found = finished("passages of the dictionary", run, files, resources, repair=False)
    planned = finished("plan of the dictionary", run, plan, resources, repair=False)
    whole = [facts for facts in found if facts is not None]
    wanted = done.get("stages", {}).get("passages", {}).get("passages")
    if len(whole) < len(found) or None in planned or sum(facts["passages"] for facts in whole) != wanted:
        return None
    return run, [facts["blocks"] for facts in whole]


def _settings(job: Distillation, text: RunFolder) -> LabelSettings:
    """Return what the tasks and actors of the labels are made with."""
    source, config = job.source, job.config
    gather = GatherSettings(
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
    hard = label_bytes(passages, tokens, 0, 0)
    return {
        "passages": passages,
        "tokens": tokens,
        "labels_bytes": hard,
        "soft_targets": top,
        "soft_targets_bytes": label_bytes(passages, tokens, 0, top) - hard,
        "pooled_bytes": label_bytes(passages, tokens, dim, 0) - hard,
        "total_bytes": label_bytes(passages, tokens, dim if job.config.pooled else 0, job.config.soft_targets),
        "workers": job.resources.actors,
        "device": job.resources.device,
    }
