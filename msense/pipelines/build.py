"""The build: a config in, a sense dictionary out, by way of the stages' files in the run folder.

Runs on the driver: it lists, cuts and hands over paths, and never holds text, embeddings or centroids. Each stage
leaves out what an earlier run has finished, so the same command goes on after any crash.
"""

import logging
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tokenizers import Tokenizer

from msense import clustering, exemplars, storage
from msense.assemble import assemble, changed_files
from msense.config import DEMO_CORPUS, DEMO_SAMPLE, DEMO_SEED, DEMO_TEACHER, BuildConfig, SenseBudget, sense_bytes
from msense.corpus import SourceFile, list_files
from msense.errors import BadInput
from msense.estimate import TeacherTimer, clustering_memory, estimate, time_teacher
from msense.kmeans import KMeansConfig
from msense.manifest import check_manifest, describe_run, made_of
from msense.mcl import MclConfig
from msense.occurrences import GatherSettings, OccurrenceActor, Unit, cut_units, longest_first, record_type, write_index
from msense.passages import make_passages, refuse_bad_documents
from msense.plan import PlanInput, make_plan
from msense.resume import Journal, finished, timed
from msense.run_folder import RunFolder, lasting, locked, sweep
from msense.runtime import Resources, connect, map_actors, peak_memory, run_task
from msense.senses import SenseSettings, count_senses
from msense.teacher import TeacherInfo, describe, resolve_dtype

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
            raise BadInput("no corpus: say where the text is with --corpus (see --help for what it can be)")
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
    root = lasting(config.output)
    if scale < 1:
        root = storage.join(root, "estimate")
    files = list_files(config.corpus)
    info, tokenizer = describe(config.teacher or DEMO_TEACHER, config)
    if config.reference and "senses" not in config.model_fields_set:
        config = config.model_copy(update={"senses": "mcl" if info.decoder else REFERENCE_SENSES})
    with locked(RunFolder(root)):
        resources = connect(config.workers, config.gpus_per_actor)
        dtype = config.dtype
        if dtype == "auto":
            dtype = run_task(resolve_dtype, dtype, resources.device, device=resources.device)
        manifest = describe_run(config, files, info, dtype, resources.device, THREADS)
        run = RunFolder(root, made_of(manifest))
        check_manifest(run, manifest)
        sweep(run)
        journal = Journal.begin(run, resources.tasks)
        build = Build(config, run, resources, info, tokenizer, dtype, files, scale, journal)
        with journal.ending_with_errors():
            summary = _run_stages(build)
        summary["driver_peak"] = peak_memory()
        storage.write_json(run.summary, summary)
        journal.end("dry run" if config.dry_run else "finished")
        sweep(run)
    return summary


def _run_stages(build: Build) -> dict[str, Any]:
    """Run what is not done yet."""
    run, config, resources, journal = build.run, build.config, build.resources, build.journal
    if not config.dry_run and (done := _finished_before(build)):
        return done
    blocks = _passages(build)
    with build.stage("plan") as facts:
        facts.update(make_plan(PlanInput(run, build.info, config, build.scale), blocks, resources, journal))
        if not facts["stored"]:
            raise BadInput("no token of this corpus may have senses (all are excluded special tokens): give other text")
    budget = _budget(config, facts["kinds"], build.info.dim)
    units = cut_units(run.blocks, build.info.dim)
    needed = clustering_memory(run, config, build.info.dim)
    build.resources = resources = resources.setting_aside(needed, config.task_memory)
    if config.dry_run:
        return {"stages": build.stages, "estimate": _estimate(build, units)}
    shards = storage.load_arrays(run.thresholds, ("shards",))["shards"]
    storage.write_json(run.units, {"units": len(units), "shards": len(shards) - 1})
    _occurrences(build, units)
    settings = cluster_settings(config, run, build.info, resources.device)
    if settings.senses_by_token:
        rule = SenseSettings(settings, budget, MclConfig(**config.mcl) if config.senses == "mcl" else None)  # type: ignore[arg-type]
        with build.stage("senses") as facts:
            facts.update(count_senses(rule, shards, resources, journal))
    with build.stage("clustering") as facts:
        centroid_files = clustering.cluster(settings, shards, resources, journal)
        facts["shards"] = len(shards) - 1
    with build.stage("dictionary") as facts:
        contexts = exemplars.resolve(run, centroid_files, units, resources, journal) if config.exemplars else []
        files = run_task(assemble, run, build.info, config, centroid_files, contexts)
        facts.update(files.pop("facts"))
        journal.add("dictionary", kept=0, made=1)
    summary = {"stages": build.stages, "dictionary": run.dictionary}
    storage.write_json(run.finished, {**summary, **files, "made_of": run.made_of})
    _drop_intermediates(build)
    return summary


def _budget(config: BuildConfig, tokens: int, dim: int) -> int:
    """Return how many senses so many tokens share with auto."""
    budget = SenseBudget.parse(config.sense_budget).senses(tokens, dim)
    if config.senses == "auto" and budget < tokens:
        raise BadInput(
            f"--sense-budget {config.sense_budget} has no room for one sense for each of {tokens:,} tokens: give "
            f"{-(-tokens * sense_bytes(dim) // 10**6)}MB or more, in a new output folder"
        )
    return budget


def _finished_before(build: Build) -> dict[str, Any] | None:
    """Return the summary of an earlier driver if its dictionary is there, every byte of it."""
    run = build.run
    done = storage.read_json(run.finished)
    if done is None or done.pop("made_of") != run.made_of:
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
    with build.stage("passages") as facts:
        storage.write_text(run.tokenizer, build.tokenizer.to_str())
        spec = build.info.passage_spec(config)
        found, blocks = make_passages(run, config, spec, build.files, build.resources, build.journal)
        facts.update(found)
    return blocks


def gather_settings(build: Build) -> GatherSettings:
    """Return what the teacher actors are made with."""
    return GatherSettings(
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


def _occurrences(build: Build, units: list[Unit]) -> None:
    """Stage 3, and the index of all units."""
    run = build.run
    with build.stage("occurrences") as facts:
        done = finished("occurrences", run, [run.unit_file(u.number) for u in units], build.resources, build.journal)
        missing = [unit for unit, f in zip(units, done, strict=True) if f is None]
        todo = [asdict(unit) for unit in longest_first(missing)]
        arguments = {"run": run, "settings": gather_settings(build)}
        for _ in map_actors("occurrences", OccurrenceActor, arguments, todo, build.resources):
            pass
        build.journal.add("occurrences", made=len(todo))
        facts.update(run_task(write_index, run, len(units)))


def _estimate(build: Build, units: list[Unit]) -> dict[str, Any]:
    """Return what the dry run tells."""
    found = estimate(build.run, build.info, build.config, build.stages, build.scale)
    found |= {"workers": build.resources.actors, "device": build.resources.device, "units": len(units)}
    found |= build.resources.described()
    found["unit_memory"] = max((unit.stored for unit in units), default=0) * record_type(build.info.dim).itemsize
    if build.config.time_teacher:
        arguments = {"run": build.run, "settings": gather_settings(build)}
        found["tokens_per_second"] = time_teacher(TeacherTimer, arguments, units, build.resources)
    return found


def cluster_settings(
    config: BuildConfig, run: RunFolder, info: TeacherInfo, device: str = "cpu"
) -> clustering.ClusterSettings:
    """Return what the clustering tasks need to know."""
    fixed = config.senses if isinstance(config.senses, int) else None
    settings = KMeansConfig(k=fixed or 1, metric=config.metric, seed=config.seed, n_init=config.n_init)
    return clustering.ClusterSettings(
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
