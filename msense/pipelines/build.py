"""Build a sense dictionary: the stages from a corpus to a dictionary folder.

The driver passes on paths, and never holds text, embeddings or centroids.
"""

import logging
import math
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from tokenizers import Tokenizer

from msense.clustering.budget import SenseBudget, sense_bytes
from msense.clustering.kmeans import KMeansConfig
from msense.clustering.mcl import MclConfig
from msense.config.build import DEMO_CORPUS, DEMO_SAMPLE, DEMO_SEED, BuildConfig
from msense.constants import DEMO_TEACHER, MAX_TOKEN_NUMBERS
from msense.corpus import SourceFile, display_uri, list_files
from msense.corpus.passages import PassageSpec
from msense.errors import InputError
from msense.io import storage
from msense.io.arrays import load_arrays
from msense.io.extras import require
from msense.io.filesystems import filesystem, is_local
from msense.pipelines.dry_run import estimate_embeddings, estimate_resources, estimate_run
from msense.pipelines.job import THREADS, fingerprints, run_job
from msense.run.folder import RunFolder, resolve_output
from msense.run.journal import timed
from msense.runtime import Executor
from msense.stages.assemble import assemble, changed_files
from msense.stages.base import StageContext, run_stage
from msense.stages.cluster import ClusterStage, clustering_memory
from msense.stages.distributed_kmeans import LargeTokenStage
from msense.stages.embed import EmbedStage
from msense.stages.embedding_store import ClusterSettings, cut_partitions, record_type, within_budget
from msense.stages.exemplars import ExemplarStage
from msense.stages.passages import PassageStage, PassageStats, passage_spec
from msense.stages.plan import PlanInput, PlanStage
from msense.stages.reading import EmbedSettings, vector_dim
from msense.stages.sense_counts import SenseCountStage
from msense.teacher.batching import TOKEN_BUDGET
from msense.teacher.spec import TeacherInfo, load_teacher_info
from msense.teacher.splitting import check_split

logger = logging.getLogger(__name__)

REFERENCE_SENSES = 20  # of an encoder, in the paper
STORE_BUDGET = 100 * 10**9  # bytes of kept embeddings on object storage


@dataclass(frozen=True)
class BuildInputs:
    """Settings, corpus and teacher of a build."""

    config: BuildConfig
    files: list[SourceFile]
    info: TeacherInfo
    tokenizer: Tokenizer
    spec: PassageSpec
    scale: float  # share of the corpus that a dry run reads


def build_dictionary(config: BuildConfig, executor: Executor | None = None) -> dict[str, Any]:
    """Build a sense dictionary, or resume an interrupted build; without corpus and teacher, build the demo.

    Returns the run's summary: `stages`, the stats of every stage; `driver_peak`, the driver's peak memory in bytes; and
    either `dictionary`, the folder, or `estimate`, the result of a dry run.

    Raises:
        InputError: settings, corpus or teacher are invalid.
        MsenseError: the run failed; the same command resumes it.

    Example:
        >>> summary = build_dictionary(BuildConfig(corpus=("texts.txt",), teacher="encoder", output="run", local=True))
        >>> dictionary = SenseDictionary.load(summary["dictionary"])
    """
    require("build", "building a dictionary")
    scale = config.sample if config.dry_run else 1.0
    if not config.corpus and config.teacher:
        raise InputError("no corpus: give the location of the text with --corpus (--help lists the supported formats)")
    if not config.corpus:
        demo = {"sample": DEMO_SAMPLE, "seed": DEMO_SEED, "dedup": True}
        own = {name: value for name, value in demo.items() if name not in config.model_fields_set}
        config = config.model_copy(update={"corpus": (DEMO_CORPUS,), **own})
    root = resolve_output(config.output)
    if scale < 1:
        root = storage.join(root, "estimate")
    files = list_files(config.corpus)
    check_split(config.teacher or DEMO_TEACHER, config.revision, config.teacher_ranks)
    info, tokenizer = load_teacher_info(config.teacher or DEMO_TEACHER, config)
    spec = passage_spec(info, config)
    if isinstance(config.senses, int) and config.senses * info.dim > MAX_TOKEN_NUMBERS:
        raise InputError(
            f"{config.senses} senses of {info.dim} dimensions exceed {MAX_TOKEN_NUMBERS} numbers per token: give --senses "
            f"{MAX_TOKEN_NUMBERS // info.dim} or less"
        )
    if config.reference and "senses" not in config.model_fields_set:
        config = config.model_copy(update={"senses": "mcl" if info.decoder else REFERENCE_SENSES})
    manifest = {
        "config": {**config.of_results(), "teacher": info.name},
        "corpus": [display_uri(uri) for uri in config.corpus],
        "inputs": fingerprints(files),
        "teacher": asdict(info),
    }
    inputs = BuildInputs(config, files, info, tokenizer, spec, scale)
    teacher = config.teacher or DEMO_TEACHER
    return run_job(config, root, executor, manifest, teacher, partial(_run_stages, inputs))


def _run_stages(given: BuildInputs, context: StageContext, dtype: str) -> dict[str, Any]:
    """Run the stages that are not finished; return the summary."""
    config, info, run, executor = given.config, given.info, context.run, context.executor
    if not config.dry_run and (done := _finished_before(config, context)):
        return done
    storage.write_text(run.tokenizer, given.tokenizer.to_str())
    reading = PassageStage(run, given.spec, given.files, config.corpus, config.on_bad_document)
    passages = run_stage(reading, context)
    planning = PlanInput(run, given.spec, config, info.vocab_size, info.dim, given.scale, config.max_points_per_part)
    plan = run_stage(PlanStage(planning, reading.blocks), context)
    if not plan.stored:
        raise InputError(
            "no token of this corpus may have senses, as all are excluded special tokens: use another text"
        )
    budget = _budget(config, plan.kinds, info.dim)
    partitions = cut_partitions(run.blocks, info.dim)
    executor.resources = executor.resources.setting_aside(clustering_memory(run, config, info.dim), config.task_memory)
    embedding = EmbedSettings(
        teacher=config.teacher or DEMO_TEACHER,
        info=info,
        dtype=dtype,
        device=executor.resources.device,
        store_dtype=config.store_dtype,
        vector_dim=vector_dim(config.teacher or DEMO_TEACHER, info),
        per_passage=config.per_passage,
        spec=given.spec,
        token_budget=TOKEN_BUDGET[executor.resources.device],
        quantized=config.embeddings_dtype == "int8",
        ranks=executor.resources.ranks,
        offload=executor.resources.offload,
        threads=THREADS,
    )
    embeddings = _embeddings_budget(config, run)
    partitions = within_budget(partitions, *embedding.kept_sizes, embeddings)
    if config.dry_run:
        estimate = estimate_run(run, info, config, passages, plan, given.scale)
        estimate |= estimate_embeddings(partitions, embedding, embeddings, given.scale)
        estimate |= estimate_resources(executor, run, embedding, partitions, timed=config.time_teacher)
        largest = max((partition.stored for partition in partitions), default=0)
        estimate["unit_memory"] = largest * record_type(info.dim).itemsize
        return {"stages": context.summary, "estimate": estimate}
    shards = load_arrays(run.thresholds, ("shards",))["shards"]
    storage.write_json(run.partitions, {"units": len(partitions), "shards": len(shards) - 1})
    run_stage(EmbedStage(run, embedding, partitions), context)
    settings = cluster_settings(config, run, info, executor.resources.device)
    if settings.senses_by_token:
        rule = MclConfig(**config.mcl) if config.senses == "mcl" else budget  # type: ignore[arg-type]
        run_stage(SenseCountStage(settings, shards, rule), context)
    clustering = ClusterStage(settings, shards)
    large = run_stage(clustering, context)
    centroid_files = clustering.outputs + (run_stage(LargeTokenStage(settings, large), context) if large else [])
    contexts = run_stage(ExemplarStage(run, centroid_files, partitions), context) if config.exemplars else []
    with timed(context.summary, "dictionary") as shown:
        made = executor.run(assemble, run, info, config, centroid_files, contexts)
        context.journal.add("dictionary", made=1)
        shown.update(made["stats"])
    summary = {"stages": context.summary, "dictionary": run.dictionary}
    storage.write_json(run.finished, {**summary, "files": made["files"], "made_of": run.inputs_hash})
    _remove_intermediates(config, run)
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


def _embeddings_budget(config: BuildConfig, run: RunFolder) -> float:
    """Return how many bytes of embeddings are kept at most."""
    if not config.keeps_embeddings or config.keep_embeddings == "all":
        return math.inf if config.keeps_embeddings else 0
    if config.embeddings_budget is not None:
        return config.embeddings_budget
    if not is_local(run.root):
        return STORE_BUDGET
    fs, folder = filesystem(run.embeddings)  # of an earlier driver
    return shutil.disk_usage(storage.absolute(run.root)).free // 4 + (fs.du(folder) if fs.exists(folder) else 0)


def _finished_before(config: BuildConfig, context: StageContext) -> dict[str, Any] | None:
    """Return the summary of an earlier driver if its dictionary is complete and unchanged."""
    run = context.run
    done = storage.read_json(run.finished)
    if done is None or done.pop("made_of") != run.inputs_hash:
        return None
    PassageStats.from_summary(done["stages"]["passages"]).check_bad_documents(config.on_bad_document)
    if changed := context.executor.run(changed_files, run, done.pop("files")):
        logger.warning("dictionary: %s is missing or corrupted; the dictionary is regenerated", ", ".join(changed))
        context.journal.add("dictionary", damaged=1)
        storage.remove(run.finished)
        return None
    done["dictionary"] = run.dictionary  # the folder may have moved
    logger.info("this dictionary is finished: %s", run.dictionary)
    context.journal.add("dictionary", kept=1)
    _remove_intermediates(config, run)
    return done


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


def _remove_intermediates(config: BuildConfig, run: RunFolder) -> None:
    """Remove the intermediate files that `--keep` does not name."""
    folders = {run.occurrences: "occurrences", run.passages: "passages", run.embeddings: "embeddings"}
    for folder, name in (folders | dict.fromkeys((run.senses_folder, run.centroids), "centroids")).items():
        if name not in config.keep:
            storage.remove(folder)
    storage.remove(run.contexts)
