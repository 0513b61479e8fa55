"""The build: a config in, a sense dictionary out, by way of the stages' files in the run folder.

Runs on the driver: it lists, cuts and hands over paths, and never holds text, embeddings or centroids. Each stage
leaves out what an earlier run has finished, so the same command goes on after any crash.
"""

import logging
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tokenizers import Tokenizer

from msense.clustering.budget import SenseBudget, sense_bytes
from msense.clustering.kmeans import KMeansConfig
from msense.clustering.mcl import MclConfig
from msense.config.build import DEMO_CORPUS, DEMO_SAMPLE, DEMO_SEED, BuildConfig
from msense.constants import DEMO_TEACHER
from msense.corpus import SourceFile, list_files
from msense.errors import InputError
from msense.io import storage
from msense.io.arrays import load_arrays
from msense.pipelines.dry_run import TeacherTimer, estimate_run, time_teacher
from msense.pipelines.manifest import describe_run
from msense.run.folder import RunFolder, locked, remove_temp_files, resolve_output
from msense.run.journal import Journal, timed
from msense.run.manifest import check_manifest, inputs_hash
from msense.run.resume import finished
from msense.runtime.executor import peak_memory
from msense.runtime.ray_executor import connect, map_actors, run_task
from msense.runtime.resources import Resources
from msense.stages import cluster, exemplars
from msense.stages.assemble import assemble, changed_files
from msense.stages.cluster import clustering_memory
from msense.stages.embed import EmbedActor, EmbedSettings, write_index
from msense.stages.embedding_store import ClusterSettings, Partition, cut_partitions, longest_first, record_type
from msense.stages.passages import make_passages, refuse_bad_documents
from msense.stages.plan import PlanInput, make_plan
from msense.stages.sense_counts import SenseSettings, count_senses
from msense.teacher.body import resolve_dtype
from msense.teacher.spec import TeacherInfo, load_teacher_info

logger = logging.getLogger(__name__)
REFERENCE_SENSES = 20  # of an encoder, in the paper
THREADS = 1  # of every teacher actor and clustering task


@dataclass
class Build:
    """A run under way: its settings, and what the stages have told so far."""

    config: BuildConfig
    run: RunFolder
    resources: Resources
    info: TeacherInfo
    tokenizer: Tokenizer
    dtype: str
    files: list[SourceFile]
    scale: float  # share of the corpus that a dry run looks at
    journal: Journal
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def teacher(self) -> str:
        """Name or folder of the teacher."""
        return self.config.teacher or DEMO_TEACHER

    def stage(self, name: str) -> AbstractContextManager[dict[str, Any]]:
        """Time a stage; what it puts into the yielded dict is shown in the summary."""
        return timed(self.stages, name)


def with_demo(config: BuildConfig) -> BuildConfig:
    """Fill in the embedded demo where neither corpus nor teacher is named."""
    if config.corpus or config.teacher:
        if not config.corpus:
            raise InputError("no corpus: say where the text is with --corpus (see --help for what it can be)")
        return config
    demo = {"sample": DEMO_SAMPLE, "seed": DEMO_SEED, "dedup": True}
    cut = {name: value for name, value in demo.items() if name not in config.model_fields_set}
    return config.model_copy(update={"corpus": (DEMO_CORPUS,), **cut})


def build_dictionary(config: BuildConfig) -> dict[str, Any]:
    """Build a sense dictionary, or go on with a build that was cut off.

    Args:
        config: all settings; `output` names the run folder.

    Returns:
        The run's summary: facts of every stage, the driver's peak memory in bytes (`driver_peak`), and either
        `dictionary`, the folder, or `estimate`, what a dry run found.

    Raises:
        BadInput: settings, corpus or teacher that do not work.
        MsenseError: the run failed; the same command goes on from what is finished.
    """
    scale = config.sample if config.dry_run else 1.0
    config = with_demo(config)
    root = resolve_output(config.output)
    if scale < 1:
        root = storage.join(root, "estimate")
    files = list_files(config.corpus)
    info, tokenizer = load_teacher_info(config.teacher or DEMO_TEACHER, config)
    if config.reference and "senses" not in config.model_fields_set:
        config = config.model_copy(update={"senses": "mcl" if info.decoder else REFERENCE_SENSES})
    with locked(RunFolder(root)):
        resources = connect(config.workers, config.gpus_per_actor)
        dtype = config.dtype
        if dtype == "auto":
            dtype = run_task(resolve_dtype, dtype, resources.device, device=resources.device)
        manifest = describe_run(config, files, info, dtype, resources.device, THREADS)
        run = RunFolder(root, inputs_hash(manifest))
        check_manifest(run, manifest)
        remove_temp_files(run)
        journal = Journal.begin(run, resources.tasks)
        build = Build(config, run, resources, info, tokenizer, dtype, files, scale, journal)
        with journal.ending_with_errors():
            summary = _run_stages(build)
        summary["driver_peak"] = peak_memory()
        storage.write_json(run.summary, summary)
        journal.end("dry run" if config.dry_run else "finished")
        remove_temp_files(run)
    return summary


def _run_stages(build: Build) -> dict[str, Any]:
    """Run what is not done yet."""
    run, config, resources, journal = build.run, build.config, build.resources, build.journal
    if not config.dry_run and (done := _finished_before(build)):
        return done
    blocks = _passages(build)
    with build.stage("plan") as stats:
        stats.update(make_plan(PlanInput(run, build.info, config, build.scale), blocks, resources, journal))
        if not stats["stored"]:
            raise InputError(
                "no token of this corpus may have senses (all are excluded special tokens): give other text"
            )
    budget = _budget(config, stats["kinds"], build.info.dim)
    partitions = cut_partitions(run.blocks, build.info.dim)
    needed = clustering_memory(run, config, build.info.dim)
    build.resources = resources = resources.setting_aside(needed, config.task_memory)
    if config.dry_run:
        return {"stages": build.stages, "estimate": _estimate(build, partitions)}
    shards = load_arrays(run.thresholds, ("shards",))["shards"]
    storage.write_json(run.partitions, {"units": len(partitions), "shards": len(shards) - 1})
    _occurrences(build, partitions)
    settings = cluster_settings(config, run, build.info, resources.device)
    if settings.senses_by_token:
        rule = SenseSettings(settings, budget, MclConfig(**config.mcl) if config.senses == "mcl" else None)  # type: ignore[arg-type]
        with build.stage("senses") as stats:
            stats.update(count_senses(rule, shards, resources, journal))
    with build.stage("clustering") as stats:
        centroid_files = cluster.cluster(settings, shards, resources, journal)
        stats["shards"] = len(shards) - 1
    with build.stage("dictionary") as stats:
        contexts = (
            exemplars.write_contexts(run, centroid_files, partitions, resources, journal) if config.exemplars else []
        )
        files = run_task(assemble, run, build.info, config, centroid_files, contexts)
        stats.update(files.pop("facts"))
        journal.add("dictionary", kept=0, made=1)
    summary = {"stages": build.stages, "dictionary": run.dictionary}
    storage.write_json(run.finished, {**summary, **files, "made_of": run.inputs_hash})
    _drop_intermediates(build)
    return summary


def _budget(config: BuildConfig, tokens: int, dim: int) -> int:
    """Return how many senses so many tokens share with auto."""
    budget = SenseBudget.parse(config.sense_budget).senses(tokens, dim)
    if config.senses == "auto" and budget < tokens:
        raise InputError(
            f"--sense-budget {config.sense_budget} has no room for one sense for each of {tokens:,} tokens: give "
            f"{-(-tokens * sense_bytes(dim) // 10**6)}MB or more, in a new output folder"
        )
    return budget


def _finished_before(build: Build) -> dict[str, Any] | None:
    """Return the summary of an earlier driver if its dictionary is there, every byte of it."""
    run = build.run
    done = storage.read_json(run.finished)
    if done is None or done.pop("made_of") != run.inputs_hash:
        return None
    refuse_bad_documents(done["stages"]["passages"], build.config)
    if changed := run_task(changed_files, run, done.pop("files")):
        logger.warning("dictionary: %s is damaged or gone; the dictionary is made again", ", ".join(changed))
        build.journal.add("dictionary", damaged=1)
        storage.remove(run.finished)
        return None
    done["dictionary"] = run.dictionary  # the folder may have moved
    logger.info("this dictionary is finished: %s", run.dictionary)
    build.journal.add("dictionary", kept=1)
    _drop_intermediates(build)
    return done


def _passages(build: Build) -> list[int]:
    """Stage 1; returns the number of blocks of every passages file."""
    run, config = build.run, build.config
    with build.stage("passages") as stats:
        storage.write_text(run.tokenizer, build.tokenizer.to_str())
        spec = build.info.passage_spec(config)
        found, blocks = make_passages(run, config, spec, build.files, build.resources, build.journal)
        stats.update(found)
    return blocks


def gather_settings(build: Build) -> EmbedSettings:
    """Return what the teacher actors are made with."""
    return EmbedSettings(
        teacher=build.teacher,
        revision=build.info.revision,
        fingerprint=build.info.fingerprint,
        layer=build.config.layer,
        dtype=build.dtype,
        device=build.resources.device,
        store_dtype=build.config.store_dtype,
        per_passage=build.config.per_passage,
        spec=build.info.passage_spec(build.config),
        dim=build.info.dim,
        threads=THREADS,
    )


def _occurrences(build: Build, partitions: list[Partition]) -> None:
    """Stage 3, and the index of all units."""
    run = build.run
    with build.stage("occurrences") as stats:
        done = finished(
            "occurrences", run, [run.partition_file(u.number) for u in partitions], build.resources, build.journal
        )
        missing = [partition for partition, f in zip(partitions, done, strict=True) if f is None]
        todo = [asdict(partition) for partition in longest_first(missing)]
        arguments = {"run": run, "settings": gather_settings(build)}
        for _ in map_actors("occurrences", EmbedActor, arguments, todo, build.resources):
            pass
        build.journal.add("occurrences", made=len(todo))
        stats.update(run_task(write_index, run, len(partitions)))


def _estimate(build: Build, partitions: list[Partition]) -> dict[str, Any]:
    """Return what the dry run tells."""
    found = estimate_run(build.run, build.info, build.config, build.stages, build.scale)
    found |= {"workers": build.resources.actors, "device": build.resources.device, "units": len(partitions)}
    found |= build.resources.described()
    found["unit_memory"] = (
        max((partition.stored for partition in partitions), default=0) * record_type(build.info.dim).itemsize
    )
    if build.config.time_teacher:
        arguments = {"run": build.run, "settings": gather_settings(build)}
        found["tokens_per_second"] = time_teacher(TeacherTimer, arguments, partitions, build.resources)
    return found


def cluster_settings(config: BuildConfig, run: RunFolder, info: TeacherInfo, device: str = "cpu") -> ClusterSettings:
    """Return what the clustering tasks need to know."""
    fixed = config.senses if isinstance(config.senses, int) else None
    settings = KMeansConfig(k=fixed or 1, metric=config.metric, seed=config.seed, n_init=config.n_init)
    return ClusterSettings(
        run=run,
        dim=info.dim,
        store_dtype=config.store_dtype,
        max_occurrences=config.max_occurrences,
        max_points_per_part=config.max_points_per_part,
        exemplars=config.exemplars,
        kmeans=replace(settings, tol=1e-4, max_rounds=300) if config.reference else settings,
        senses_by_token=fixed is None,
        device=device,
    )


def _drop_intermediates(build: Build) -> None:
    """Remove what `--keep` does not name."""
    run = build.run
    folders = {
        run.occurrences: "occurrences",
        run.senses_folder: "centroids",
        run.centroids: "centroids",
        run.passages: "passages",
    }
    for folder, name in folders.items():
        if name not in build.config.keep:
            storage.remove(folder)
    storage.remove(run.contexts)
