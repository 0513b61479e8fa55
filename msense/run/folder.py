"""A run folder: the names of all its files, and the lock that keeps a second driver out.

On a local disk the lock is the operating system's (flock), which is released when its driver dies; on S3 it is a lease.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from msense.errors import InputError
from msense.io import filesystems, storage
from msense.io.scratch import is_scratch
from msense.io.storage import join
from msense.run.lease import driver_name, leased

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the driver of a submitted job only
_MANIFEST = {"config": dict, "corpus": list, "inputs": dict, "teacher": dict, "pins": dict}


class _Path:
    """Attribute of a run folder: the URI of a file or folder at a fixed place below its root."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __get__(self, run: "RunFolder", owner: type) -> str:
        return join(run.root, self.place)


def _numbered(pattern: str) -> Callable[["RunFolder", int], str]:
    """Return a method of a run folder from a number to the URI of a file."""
    return lambda run, number: join(run.root, pattern.format(number))


@dataclass(frozen=True)
class RunFolder:
    """The URIs of all files of a run.

    Example:
        >>> RunFolder("s3://bucket/run").passages_file(7)
        's3://bucket/run/passages/000007.parquet'
    """

    root: str
    inputs_hash: str = ""  # of the manifest; files with another one are invalid

    manifest = _Path("manifest.json")  # settings and fingerprints of everything that the results depend on
    lock = _Path(".lock")  # held by the driver at work
    holder = _Path(".driver")  # who holds the lock on a local disk
    journal = _Path("journal.json")  # what each driver kept, regenerated and wrote, by stage
    summary = _Path("summary.json")  # stats and seconds of each stage, and peak memory, of the last driver
    tokenizer = _Path("tokenizer.json")
    bad_documents = _Path("bad_documents.jsonl")  # the first of each reason
    passages = _Path("passages")
    plan = _Path("plan")
    thresholds = _Path("plan/plan.safetensors")  # per token: threshold key, count in the corpus, stored occurrences
    blocks = _Path("plan/blocks.parquet")  # per row group of the passages files: what the teacher has to read
    duplicates = _Path("plan/duplicates.safetensors")  # passages that `--dedup` drops: input split, block, row
    partitions = _Path("plan/units.json")  # number of partitions and shards
    occurrences = _Path("occurrences")
    embeddings = _Path("embeddings")
    offsets = _Path("occurrences/index.safetensors")  # int64 [partitions, shards + 1], start of each shard's rows
    senses_folder = _Path("senses")
    senses = _Path("senses/senses.safetensors")  # int64 [V], number of senses of each token
    centroids = _Path("centroids")
    contexts = _Path("contexts")  # one file per partition, before they are merged
    contexts_index = _Path("contexts/index.parquet")  # places of all exemplars, one row group per partition
    dictionary = _Path("dictionary")
    labels = _Path("labels")  # files of labels; in the run of a dictionary or student: run folders of labels
    labels_place = _Path("labels.json")  # where the labels of a student are
    queries = _Path("queries")  # a run folder with the passages of the texts of `--queries`
    label_senses = _Path("labels/senses.safetensors")  # int32 [V], number of senses of each token in the dictionary
    label_manifest = _Path("labels/labels.json")  # written last: the inputs and the partitions of complete labels
    training = _Path("training")  # checkpoints, one folder per training
    progress = _Path("training/progress.json")  # of the current training
    metrics = _Path("metrics.jsonl")  # one line per epoch
    student = _Path("student")
    teacher = _Path("teacher.json")  # where the teacher's folder was, on the machine of the last driver
    finished = _Path("finished.json")  # written last: the stats of a complete dictionary

    passages_file = _numbered("passages/{:06d}.parquet")  # of an input split
    bad_file = _numbered("passages/{:06d}.bad.json")  # bad documents of an input split
    partition_file = _numbered("occurrences/{:06d}.records")  # of a partition
    embeddings_file = _numbered("embeddings/{:06d}.embeddings")  # of all tokens that the teacher read in a partition
    curves_file = _numbered("senses/{:06d}.safetensors")  # variance curves (MCL: sense counts) of a shard of token ids
    shard_file = _numbered("centroids/{:06d}.safetensors")  # centroids of a shard
    token_file = _numbered("centroids/token-{:08d}.safetensors")  # centroids of a token that is clustered in chunks
    round_file = _numbered("centroids/token-{:08d}-round.safetensors")  # after its latest round, to resume from
    contexts_file = _numbered("contexts/{:06d}.parquet")  # of the exemplars of a partition
    label_file = _numbered("labels/{:06d}.safetensors")  # of a partition

    def publish(self, uri: str, write: Callable[[Path], Any], stats: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write a file of this run and its done-marker; see `storage.publish`."""
        return storage.publish(uri, write, stats, self.inputs_hash)

    def read_manifest(self) -> dict[str, Any] | None:
        """Return the manifest; None if it is missing, corrupted or incomplete."""
        return storage.read_json(self.manifest, _MANIFEST)

    def remember_teacher(self, name: str) -> None:
        """Write where the teacher's folder is; a hub name is in the manifest."""
        if Path(name).is_dir():
            storage.write_json(self.teacher, {"folder": str(Path(name).absolute())})

    def teacher_folder(self) -> str | None:
        """Return the teacher's folder if it is still where it was."""
        folder = (storage.read_json(self.teacher) or {}).get("folder")
        return folder if isinstance(folder, str) and Path(folder).is_dir() else None

    def outputs(self) -> tuple[str, ...]:
        """Return all outputs of the stages but labels, in their order."""
        folders = (self.passages, self.plan, self.occurrences, self.embeddings, self.senses_folder, self.centroids)
        return (*folders, self.contexts, self.dictionary, self.queries, self.student, self.finished)


def resolve_output(output: str, flag: str = "--output") -> str:
    """Return an output, which a flag sets, as an absolute URI.

    Raises:
        InputError: the path is relative in a submitted job, whose working directory Ray removes.
    """
    local = filesystems.is_local(output)
    if local and SUBMITTED in os.environ and not Path(output.removeprefix("file://")).is_absolute():
        raise InputError(
            f"{flag} {output} is relative, and a submitted job runs in a copy of its working directory that Ray removes: "
            "give an absolute path or a URI that every node can reach"
        )
    return storage.absolute(output)


@contextmanager
def locked(run: RunFolder, flag: str = "--output") -> Iterator[None]:
    """Lock a run folder, which a flag sets, on a local disk or on S3 against a second driver.

    Raises:
        InputError: another driver holds the lock.
    """
    if not filesystems.is_local(run.root):
        with leased(run.lock, flag) if filesystems.is_s3(run.root) else nullcontext():
            yield
        return
    storage.make_folder(run.root)
    holder = Path(run.holder)
    try:
        lock = FileLock(run.lock, timeout=0).acquire()
    except Timeout as error:
        driver = holder.read_text(encoding="utf-8") if holder.is_file() else "unknown process"
        raise InputError(
            f"another driver works on {run.root} ({driver}): wait for it, or give another {flag}"
        ) from error
    with lock:
        holder.write_text(driver_name(), encoding="utf-8")
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)


def remove_temp_files(run: RunFolder) -> None:
    """Remove the temporary files that killed processes left in a run folder on a local disk."""
    if not filesystems.is_local(run.root):
        return
    files = (run.manifest, run.journal, run.summary, run.tokenizer, run.bad_documents, run.labels_place, run.finished)
    paths = [path for file in files for path in Path(run.root).glob(f".{Path(file).name}.*.part")]
    paths += Path(run.labels).glob(".*.part")  # folders there are runs, where other drivers may be at work
    paths += [path for folder in run.outputs()[:-1] for path in Path(folder).rglob(".*.part")]
    for path in filter(is_scratch, paths):
        path.unlink(missing_ok=True)
