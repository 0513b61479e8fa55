"""The build: a config in, a sense dictionary out, by way of the stages' files in the run folder.

Runs on the driver: it lists, cuts and hands over paths, and never holds text, embeddings or centroids. Each stage
leaves out what an earlier run has finished, so the same command goes on after any crash.
"""

import json
import logging
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from msense import clustering, exemplars, storage
from msense.assemble import assemble
from msense.config import DEMO_CORPUS, DEMO_SAMPLE, DEMO_SEED, DEMO_TEACHER, BuildConfig
from msense.corpus import WHOLE, Piece, SourceFile, count_rows, cut_pieces, display_uri, list_files, number_pieces
from msense.errors import BadInput
from msense.estimate import estimate, time_teacher
from msense.kmeans import KMeansConfig
from msense.occurrences import GatherSettings, OccurrenceActor, Unit, cut_units, record_type, write_index
from msense.plan import PlanInput, make_plan
from msense.runtime import Resources, connect, map_actors, map_data, map_tasks, run_task
from msense.storage import RunFolder
from msense.teacher import TOKEN_BUDGET, TeacherInfo, describe, resolve_dtype
from msense.tokens import LISTED_BAD_DOCUMENTS, write_passages

logger = logging.getLogger(__name__)

THREADS = 1  # of every teacher actor and clustering task
PINNED_PACKAGES = ("msense", "torch", "transformers", "tokenizers", "deepspeed", "numpy", "ray")


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
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def teacher(self) -> str:
        """Name or folder of the teacher."""
        return self.config.teacher or DEMO_TEACHER

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage; what it puts into the yielded dict is shown in the summary."""
        facts: dict[str, Any] = {}
        logger.info("%s ...", name)
        began = time.monotonic()
        yield facts
        facts["seconds"] = round(time.monotonic() - began, 1)
        self.stages[name] = facts
        logger.info(
            "%s: %s",
            name,
            ", ".join(
                f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in facts.items()
            ),
        )


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
    root = storage.absolute(config.output)
    if scale < 1:
        root = storage.join(root, "estimate")
    run = RunFolder(root)
    files = list_files(config.corpus)
    info, tokenizer = describe(config.teacher or DEMO_TEACHER, config)
    with _locked(run):
        resources = connect(config.workers)
        dtype = config.dtype
        if dtype == "auto":
            dtype = run_task(resolve_dtype, dtype, resources.device, device=resources.device)
        build = Build(config, run, resources, info, tokenizer, dtype, files, scale)
        _check_manifest(build)
        summary = _run_stages(build)
        summary["driver_peak"] = _peak_memory()
        storage.write_json(run.summary, summary)
    return summary


def _peak_memory() -> int:
    """Return the most memory this process has held, in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def _run_stages(build: Build) -> dict[str, Any]:
    """Run what is not done yet."""
    done = storage.read_json(build.run.finished)
    if done is not None and not build.config.dry_run:
        if storage.exists(storage.join(build.run.dictionary, "config.json")):
            logger.info("this dictionary is finished: %s", build.run.dictionary)
            _drop_intermediates(build)
            return done
        storage.remove(build.run.finished)
    blocks = _passages(build)
    with build.stage("plan") as facts:
        facts.update(make_plan(PlanInput(build.run, build.info, build.config, build.scale), blocks, build.resources))
        if not facts["stored"]:
            raise BadInput("no token of this corpus may have senses (all are excluded special tokens): give other text")
    units = cut_units(build.run.blocks, build.info.dim)
    if build.config.dry_run:
        return {"stages": build.stages, "estimate": _estimate(build, units)}
    shards = storage.load_arrays(build.run.thresholds, ("shards",))["shards"]
    storage.write_json(build.run.units, {"units": len(units), "shards": len(shards) - 1})
    _occurrences(build, units)
    with build.stage("clustering") as facts:
        centroid_files = clustering.cluster(
            cluster_settings(build.config, build.run, build.info), shards, build.resources
        )
        facts["shards"] = len(shards) - 1
    with build.stage("dictionary") as facts:
        contexts = (
            exemplars.resolve(build.run, centroid_files, units, build.resources) if build.config.exemplars else []
        )
        facts.update(run_task(assemble, build.run, build.info, build.config, centroid_files, contexts))
    summary = {"stages": build.stages, "dictionary": build.run.dictionary}
    storage.write_json(build.run.finished, summary)
    _drop_intermediates(build)
    return summary


def _passages(build: Build) -> list[int]:
    """Stage 1; returns the number of blocks of every passages file."""
    run, config = build.run, build.config
    with build.stage("passages") as facts:
        storage.write_text(run.tokenizer, build.tokenizer.to_str())
        pieces = _numbered(cut_pieces(build.files), build.resources)
        found = {n: storage.facts_of(run.passages_file(n)) for n in range(len(pieces))}
        todo = [{"number": n, **asdict(pieces[n])} for n, f in found.items() if f is None]
        work = partial(
            _write_piece, run=run, spec=build.info.passage_spec(config), fail_on_bad=config.on_bad_document == "fail"
        )
        for row in map_data("passages", work, todo, build.resources):
            found[row["number"]] = row
        whole = [f for f in found.values() if f is not None]
        bad: dict[str, int] = {}
        for row in whole:
            for reason, count in row["bad"].items():
                bad[reason] = bad.get(reason, 0) + count
        if bad and config.on_bad_document == "fail":
            raise BadInput(f"the corpus has bad documents ({_told(bad)}); --on-bad-document skip goes past them")
        facts |= {name: sum(row[name] for row in whole) for name in ("documents", "passages", "tokens")}
        facts |= {"bad documents": sum(bad.values())} | {
            f"bad: {reason}": count for reason, count in sorted(bad.items())
        }
        run_task(_list_bad_documents, run, len(whole))
    if not facts["passages"]:
        told = _told(bad) or "no documents in it"
        raise BadInput(
            f"the corpus {' '.join(display_uri(u) for u in config.corpus)} has no text ({told}): check the path and --text-column"
        )
    return [row["blocks"] for row in whole]


def _told(bad: dict[str, int]) -> str:
    return "; ".join(f"{count} {reason}" for reason, count in sorted(bad.items()))


def _numbered(pieces: list[Piece], resources: Resources) -> list[Piece]:
    """Count the rows before each piece of a file that was cut by bytes."""
    unknown = [n for n, piece in enumerate(pieces) if piece.format in ("txt", "jsonl") and piece.stop != WHOLE]
    if not unknown:
        return pieces
    counts = [0] * len(pieces)
    for row in map_tasks(
        "counting rows", _count_piece, [{"number": n, **asdict(pieces[n])} for n in unknown], resources
    ):
        counts[row["number"]] = row["rows"]
    return number_pieces(pieces, counts)


def _count_piece(item: dict[str, Any]) -> dict[str, Any]:
    number = item.pop("number")
    return {"number": number, "rows": count_rows(Piece(**item))}


def _write_piece(item: dict[str, Any], run: RunFolder, spec: Any, fail_on_bad: bool) -> dict[str, Any]:  # noqa: ANN401
    """Write the passages of one piece."""
    number = item.pop("number")
    tokenizer = Tokenizer.from_str(storage.read_text(run.tokenizer))

    def write(path: Path) -> dict[str, Any]:
        facts = write_passages(Piece(**item), spec, tokenizer, path, fail_on_bad)
        if listed := facts.pop("listed"):
            storage.write_json(run.bad_file(number), {"listed": listed})
        return {**facts, "blocks": len(facts["blocks"])}

    return storage.publish(run.passages_file(number), write, {"number": number})


def _list_bad_documents(run: RunFolder, pieces: int) -> None:
    """Write the first hundred bad documents of each reason, in input order."""
    told: dict[str, int] = {}
    lines = []
    for piece in range(pieces):
        facts = storage.facts_of(run.passages_file(piece)) or {"bad": {}}
        if not any(told.get(reason, 0) < LISTED_BAD_DOCUMENTS for reason in facts["bad"]):
            continue
        for document in (storage.read_json(run.bad_file(piece)) or {"listed": []})["listed"]:
            told[document["reason"]] = told.get(document["reason"], 0) + 1
            if told[document["reason"]] <= LISTED_BAD_DOCUMENTS:
                lines.append(json.dumps(document, ensure_ascii=False))
    storage.write_text(run.bad_documents, "".join(line + "\n" for line in lines))


def gather_settings(build: Build) -> GatherSettings:
    """Return what the teacher actors are made with."""
    return GatherSettings(
        teacher=build.teacher,
        revision=build.config.revision,
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
        done = {unit.number for unit in units if storage.facts_of(run.unit_file(unit.number)) is not None}
        todo = [asdict(unit) for unit in units if unit.number not in done]
        arguments = {"root": run.root, "settings": gather_settings(build)}
        for _ in map_actors("occurrences", OccurrenceActor, arguments, todo, build.resources):
            pass
        facts.update(run_task(write_index, run, len(units)))


def _estimate(build: Build, units: list[Unit]) -> dict[str, Any]:
    """Return what the dry run tells."""
    found = estimate(build.run, build.info, build.config, build.stages, build.scale)
    found |= {"workers": build.resources.actors, "device": build.resources.device, "units": len(units)}
    found["unit_memory"] = max((unit.stored for unit in units), default=0) * record_type(build.info.dim).itemsize
    if build.config.time_teacher:
        found["tokens_per_second"] = time_teacher(build.run, gather_settings(build), units, build.resources)
    return found


def cluster_settings(config: BuildConfig, run: RunFolder, info: TeacherInfo) -> clustering.ClusterSettings:
    """Return what the clustering tasks need to know."""
    return clustering.ClusterSettings(
        run=run,
        dim=info.dim,
        store_dtype=config.store_dtype,
        max_occurrences=config.max_occurrences,
        max_points_per_part=config.max_points_per_part,
        exemplars=config.exemplars,
        kmeans=KMeansConfig(k=config.senses, metric=config.metric, seed=config.seed),
    )


def _drop_intermediates(build: Build) -> None:
    """Remove what `--keep` does not name."""
    run, keep = build.run, build.config.keep
    for name, folder in (("occurrences", run.occurrences), ("centroids", run.centroids), ("passages", run.passages)):
        if name not in keep:
            storage.remove(folder)
    storage.remove(run.contexts)


@contextmanager
def _locked(run: RunFolder) -> Iterator[None]:
    """Hold the run folder against a second driver; the lock of a driver that died is free."""
    from filelock import FileLock, Timeout

    if not storage.is_local(run.root):
        yield
        return
    storage.make_folder(run.root)
    lock = FileLock(run.lock, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BadInput(f"another driver works on {run.root}: wait for it, or give another --output") from error
    try:
        for left in Path(run.root).glob("**/.*.part"):  # of a process that was killed while it wrote
            left.unlink()
        yield
    finally:
        lock.release()


def _check_manifest(build: Build) -> None:
    """Write the manifest of a new run; refuse to go on with a run made of other things."""
    manifest = {
        "format": 1,
        "config": {**build.config.of_results(), "teacher": build.info.name},
        "corpus": [display_uri(uri) for uri in build.config.corpus],
        "inputs": {f.name: f"{f.size} {f.fingerprint}" for f in build.files},
        "teacher": json.loads(json.dumps(asdict(build.info))),
        "pins": {
            "dtype": build.dtype,
            "device": build.resources.device,
            "token_budget": TOKEN_BUDGET[build.resources.device],
            "threads": THREADS,
            "tf32": False,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PINNED_PACKAGES},
        },
    }
    before = storage.read_json(build.run.manifest)
    if before is None:
        storage.write_json(build.run.manifest, manifest)
        return
    parts = ("format", "config", "inputs", "teacher", "pins")
    changes = [c for part in parts for c in differences(part, before.get(part), manifest[part])]
    if changes:
        shown = "\n".join(f"  {change}" for change in changes[:10]) + ("\n  ..." if len(changes) > 10 else "")
        raise BadInput(
            f"the run in {build.run.root} was made with other things:\n{shown}\n"
            "Give another --output, or delete that folder to start afresh."
        )


def differences(name: str, before: Any, now: Any) -> list[str]:  # noqa: ANN401 - any JSON value
    """List what differs between two JSON values, a line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [line for key in keys for line in differences(f"{name}.{key}", before.get(key), now.get(key))]
    return [] if before == now else [f"{name}: {before!r} then, {now!r} now"]
