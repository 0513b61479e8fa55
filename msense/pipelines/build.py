"""Build a sense dictionary: the stages from a corpus to a dictionary folder.

The driver passes on paths, and never holds text, embeddings or centroids.
"""

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tokenizers import Tokenizer

from msense.clustering.budget import SenseBudget, sense_bytes
from msense.clustering.kmeans import KMeansConfig
from msense.clustering.mcl import MclConfig
from msense.config.build import DEMO_CORPUS, DEMO_SAMPLE, DEMO_SEED, BuildConfig
from msense.constants import DEMO_TEACHER, MAX_TOKEN_NUMBERS
from msense.corpus import SourceFile, list_files
from msense.corpus.passages import PassageSpec
from msense.errors import InputError
from msense.io import storage
from msense.io.arrays import load_arrays
from msense.pipelines.dry_run import TeacherTimer, estimate_run, time_teacher
from msense.pipelines.job import THREADS, run_job
from msense.pipelines.manifest import describe_run
from msense.run.folder import RunFolder, resolve_output
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.assemble import AssembleStage, changed_files
from msense.stages.base import StageContext, run_stage
from msense.stages.cluster import ClusterStage, clustering_memory
from msense.stages.distributed_kmeans import LargeTokenStage
from msense.stages.embed import EmbedSettings, EmbedStage
from msense.stages.embedding_store import ClusterSettings, Partition, cut_partitions, record_type
from msense.stages.exemplars import ExemplarStage
from msense.stages.passages import PassageStage, PassageStats, passage_spec
from msense.stages.plan import PlanInput, PlanStage, PlanStats
from msense.stages.sense_counts import SenseCountStage, SenseSettings
from msense.teacher.spec import TeacherInfo, load_teacher_info

logger = logging.getLogger(__name__)

REFERENCE_SENSES = 20  # of an encoder, in the paper


@dataclass
class Build:
    """A run in progress."""

    config: BuildConfig
    info: TeacherInfo
    tokenizer: Tokenizer
    spec: PassageSpec
    dtype: str
    files: list[SourceFile]
    scale: float  # share of the corpus that a dry run reads
    context: StageContext


def with_demo(config: BuildConfig) -> BuildConfig:
    """Fill in the embedded demo where neither corpus nor teacher is given."""
    if config.corpus or config.teacher:
        if not config.corpus:
            raise InputError(
                "no corpus: give the location of the text with --corpus (--help lists the supported formats)"
            )
        return config
    demo = {"sample": DEMO_SAMPLE, "seed": DEMO_SEED, "dedup": True}
    cut = {name: value for name, value in demo.items() if name not in config.model_fields_set}
    return config.model_copy(update={"corpus": (DEMO_CORPUS,), **cut})


def build_dictionary(config: BuildConfig, executor: Executor | None = None) -> dict[str, Any]:
    """Build a sense dictionary, or resume an interrupted build.

    Args:
        config: all settings; `output` names the run folder.
        executor: where the work runs; by default what the settings select.

    Returns:
        The run's summary: `stages`, the stats of every stage; `driver_peak`, the driver's peak memory in bytes; and either
        `dictionary`, the folder, or `estimate`, the result of a dry run.

    Raises:
        InputError: settings, corpus or teacher are invalid.
        MsenseError: the run failed; the same command resumes it.

    Example:
        >>> summary = build_dictionary(BuildConfig(corpus=("texts.txt",), teacher="encoder", output="run", local=True))
        >>> dictionary = SenseDictionary.load(summary["dictionary"])
    """
    scale = config.sample if config.dry_run else 1.0
    config = with_demo(config)
    root = resolve_output(config.output)
    if scale < 1:
        root = storage.join(root, "estimate")
    files = list_files(config.corpus)
    info, tokenizer = load_teacher_info(config.teacher or DEMO_TEACHER, config)
    spec = passage_spec(info, config)
    if isinstance(config.senses, int) and config.senses * info.dim > MAX_TOKEN_NUMBERS:
        raise InputError(
            f"{config.senses} senses of {info.dim} dimensions exceed {MAX_TOKEN_NUMBERS} numbers per token: give --senses "
            f"{MAX_TOKEN_NUMBERS // info.dim} or less"
        )
    if config.reference and "senses" not in config.model_fields_set:
        config = config.model_copy(update={"senses": "mcl" if info.decoder else REFERENCE_SENSES})

    def stages(context: StageContext, dtype: str) -> dict[str, Any]:
        return _run_stages(Build(config, info, tokenizer, spec, dtype, files, scale, context))

    return run_job(config, root, executor, partial(describe_run, config, files, info), stages)


def _run_stages(build: Build) -> dict[str, Any]:
    """Run the stages that are not finished; return the summary."""
    config, context, info, run = build.config, build.context, build.info, build.context.run
    if not config.dry_run and (done := _finished_before(build)):
        return done
    storage.write_text(run.tokenizer, build.tokenizer.to_str())
    reading = PassageStage(run, build.spec, build.files, config.corpus, config.on_bad_document)
    passages = run_stage(reading, context)
    plan = run_stage(
        PlanStage(PlanInput(run, build.spec, config, info.vocab_size, info.dim, build.scale), reading.blocks), context
    )
    if not plan.stored:
        raise InputError(
            "no token of this corpus may have senses, as all are excluded special tokens: use another text"
        )
    budget = _budget(config, plan.kinds, info.dim)
    partitions = cut_partitions(run.blocks, info.dim)
    executor = context.executor
    executor.resources = executor.resources.setting_aside(clustering_memory(run, config, info.dim), config.task_memory)
    if config.dry_run:
        return {"stages": context.summary, "estimate": _estimate(build, passages, plan, partitions)}
    shards = load_arrays(run.thresholds, ("shards",))["shards"]
    storage.write_json(run.partitions, {"units": len(partitions), "shards": len(shards) - 1})
    settings = cluster_settings(config, run, info, executor.resources.device)
    run_stage(EmbedStage(run, embed_settings(build), partitions), context)
    if settings.senses_by_token:
        mcl = MclConfig(**config.mcl) if config.senses == "mcl" else None  # type: ignore[arg-type]
        run_stage(SenseCountStage(SenseSettings(settings, budget, mcl), shards), context)
    clustering = ClusterStage(settings, shards)
    large = run_stage(clustering, context)
    centroid_files = clustering.outputs() + (run_stage(LargeTokenStage(settings, large), context) if large else [])
    contexts = run_stage(ExemplarStage(run, centroid_files, partitions), context) if config.exemplars else []
    assembling = AssembleStage(run, info, config, centroid_files, contexts)
    run_stage(assembling, context)
    summary = {"stages": context.summary, "dictionary": run.dictionary}
    storage.write_json(run.finished, {**summary, "files": assembling.written, "made_of": run.inputs_hash})
    _remove_intermediates(build)
    return summary


def _budget(config: BuildConfig, tokens: int, dim: int) -> int:
    """Return the total number of senses with `--senses auto`."""
    budget = SenseBudget.parse(config.sense_budget).senses(tokens, dim)
    if config.senses == "auto" and budget < tokens:
        raise InputError(
            f"--sense-budget {config.sense_budget} is less than one sense for each of {tokens:,} tokens: set it to at least "
            f"{-(-tokens * sense_bytes(dim) // 10**6)}MB, with a new --output"
        )
    return budget


def _finished_before(build: Build) -> dict[str, Any] | None:
    """Return the summary of an earlier driver if its dictionary is complete and unchanged."""
    context, run = build.context, build.context.run
    done = storage.read_json(run.finished)
    if done is None or done.pop("made_of") != run.inputs_hash:
        return None
    PassageStats.from_summary(done["stages"]["passages"]).check_bad_documents(build.config.on_bad_document)
    if changed := context.executor.run(changed_files, run, done.pop("files")):
        logger.warning("dictionary: %s is missing or corrupted; the dictionary is regenerated", ", ".join(changed))
        context.journal.add("dictionary", damaged=1)
        storage.remove(run.finished)
        return None
    done["dictionary"] = run.dictionary  # the folder may have moved
    logger.info("this dictionary is finished: %s", run.dictionary)
    context.journal.add("dictionary", kept=1)
    _remove_intermediates(build)
    return done


def embed_settings(build: Build) -> EmbedSettings:
    """Return the settings of the teacher actors."""
    return EmbedSettings(
        teacher=build.config.teacher or DEMO_TEACHER,
        info=build.info,
        dtype=build.dtype,
        device=build.context.executor.resources.device,
        store_dtype=build.config.store_dtype,
        per_passage=build.config.per_passage,
        spec=build.spec,
        threads=THREADS,
    )


def _estimate(build: Build, passages: PassageStats, plan: PlanStats, partitions: list[Partition]) -> Row:
    """Return the result of a dry run."""
    executor = build.context.executor
    estimate = estimate_run(build.context.run, build.info, build.config, passages, plan, build.scale)
    estimate |= {"workers": executor.resources.actors, "device": executor.resources.device, "units": len(partitions)}
    estimate |= executor.resources.described()
    largest = max((partition.stored for partition in partitions), default=0)
    estimate["unit_memory"] = largest * record_type(build.info.dim).itemsize
    if build.config.time_teacher:
        arguments = {"run": build.context.run, "settings": embed_settings(build)}
        estimate["tokens_per_second"] = time_teacher(TeacherTimer, arguments, partitions, executor)
    return estimate


def cluster_settings(config: BuildConfig, run: RunFolder, info: TeacherInfo, device: str = "cpu") -> ClusterSettings:
    """Return the settings of the clustering tasks."""
    fixed = config.senses if isinstance(config.senses, int) else None
    settings = KMeansConfig(k=fixed or 1, metric=config.metric, seed=config.seed, n_init=config.n_init)
    return ClusterSettings(
        **config.model_dump(include={"store_dtype", "max_occurrences", "max_points_per_part", "exemplars"}),
        run=run,
        dim=info.dim,
        kmeans=replace(settings, tol=1e-4, max_rounds=300) if config.reference else settings,
        senses_by_token=fixed is None,
        device=device,
    )


def _remove_intermediates(build: Build) -> None:
    """Remove the intermediate files that `--keep` does not name."""
    run = build.context.run
    folders = {run.occurrences: "occurrences", run.passages: "passages"}
    for folder, name in (folders | dict.fromkeys((run.senses_folder, run.centroids), "centroids")).items():
        if name not in build.config.keep:
            storage.remove(folder)
    storage.remove(run.contexts)
