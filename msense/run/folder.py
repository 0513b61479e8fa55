"""A run folder: the names of all its files, and the lock that keeps a second driver out.

Holds nothing but strings. On a local disk the lock is the system's own (flock), so that of a driver that died is free at
once; on S3 it is a lease.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from msense.errors import InputError
from msense.io import filesystems, storage
from msense.io.filesystems import is_s3
from msense.io.scratch import is_scratch
from msense.io.storage import join
from msense.run.lease import leased

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray gives it to the driver of a submitted job, and to nobody else
_MANIFEST = {"config": dict, "corpus": list, "inputs": dict, "teacher": dict, "pins": dict}


@dataclass(frozen=True)
class RunFolder:
    """Names of all files in a run folder; nobody else joins strings."""

    root: str
    inputs_hash: str = ""  # hash of the manifest: files of a run made of other things do not count

    def publish(self, uri: str, write: Callable[[Path], Any], stats: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write a file of this run and its done-marker, as `storage.publish`."""
        return storage.publish(uri, write, stats, self.inputs_hash)

    def read_manifest(self) -> dict[str, Any] | None:
        """Return the manifest; None when it is missing or damaged, or lacks what every manifest has."""
        return storage.read_json(self.manifest, _MANIFEST)

    @property
    def manifest(self) -> str:
        """The config and the fingerprints of everything that the results depend on."""
        return join(self.root, "manifest.json")

    @property
    def lock(self) -> str:
        """Held by the driver while it works (local disks and S3)."""
        return join(self.root, ".lock")

    @property
    def holder(self) -> str:
        """Who holds the lock."""
        return join(self.root, ".driver")

    @property
    def summary(self) -> str:
        """What the last driver found: seconds and counts a stage, its peak memory."""
        return join(self.root, "summary.json")

    @property
    def journal(self) -> str:
        """What every driver did, stage by stage."""
        return join(self.root, "journal.json")

    @property
    def bad_documents(self) -> str:
        """The first hundred bad documents of each reason, one JSON object a line."""
        return join(self.root, "bad_documents.jsonl")

    @property
    def tokenizer(self) -> str:
        """The teacher's tokenizer, as one tokenizer.json."""
        return join(self.root, "tokenizer.json")

    @property
    def passages(self) -> str:
        """Folder of stage 1."""
        return join(self.root, "passages")

    @property
    def plan(self) -> str:
        """Folder of stage 2."""
        return join(self.root, "plan")

    @property
    def thresholds(self) -> str:
        """Per token: threshold key, count in the corpus, stored occurrences."""
        return join(self.plan, "plan.safetensors")

    @property
    def blocks(self) -> str:
        """Per row group of the passages files: what the teacher must read of it."""
        return join(self.plan, "blocks.parquet")

    @property
    def duplicates(self) -> str:
        """Passages that `--dedup` drops: piece, block, row."""
        return join(self.plan, "duplicates.safetensors")

    @property
    def partitions(self) -> str:
        """How many units and shards the plan was cut into."""
        return join(self.plan, "units.json")

    @property
    def occurrences(self) -> str:
        """Folder of stage 3."""
        return join(self.root, "occurrences")

    @property
    def offsets(self) -> str:
        """Where each shard's rows lie in each unit: int64 [units, shards + 1]."""
        return join(self.occurrences, "index.safetensors")

    @property
    def senses_folder(self) -> str:
        """Folder of stage 4, first half: how many senses each token gets."""
        return join(self.root, "senses")

    @property
    def senses(self) -> str:
        """Number of senses of every token: int64 [V]."""
        return join(self.senses_folder, "senses.safetensors")

    @property
    def centroids(self) -> str:
        """Folder of stage 4, second half."""
        return join(self.root, "centroids")

    @property
    def contexts(self) -> str:
        """Folder of the exemplars' contexts, a file a unit, before they are brought together."""
        return join(self.root, "contexts")

    @property
    def dictionary(self) -> str:
        """Folder of stage 5."""
        return join(self.root, "dictionary")

    @property
    def contexts_index(self) -> str:
        """Places of all exemplars, a row group a unit."""
        return join(self.contexts, "index.parquet")

    @property
    def labels(self) -> str:
        """Folder of stage 6."""
        return join(self.root, "labels")

    @property
    def label_blocks(self) -> str:
        """Per row group of the passages files: what is labelled of it."""
        return join(self.labels, "blocks.parquet")

    @property
    def label_senses(self) -> str:
        """How many senses each token has in the dictionary: int32 [V]."""
        return join(self.labels, "senses.safetensors")

    @property
    def label_manifest(self) -> str:
        """There once the labels are whole: what they are of, and every unit."""
        return join(self.labels, "labels.json")

    @property
    def training(self) -> str:
        """Folder of checkpoints, a training by its settings each."""
        return join(self.root, "training")

    @property
    def progress(self) -> str:
        """How far the training under way is."""
        return join(self.training, "progress.json")

    @property
    def metrics(self) -> str:
        """Metrics of every epoch, a JSON object a line."""
        return join(self.root, "metrics.jsonl")

    @property
    def student(self) -> str:
        """Folder of stage 7."""
        return join(self.root, "student")

    @property
    def finished(self) -> str:
        """There once the dictionary is whole; the facts of the whole run."""
        return join(self.root, "finished.json")

    def outputs(self) -> tuple[str, ...]:
        """All that the stages write, in their order."""
        folders = (self.passages, self.plan, self.occurrences, self.senses_folder, self.centroids)
        return (*folders, self.contexts, self.dictionary, self.labels, self.student, self.finished)

    def passages_file(self, split: int) -> str:
        """Passages of one piece of the corpus."""
        return join(self.passages, f"{split:06d}.parquet")

    def bad_file(self, split: int) -> str:
        """The first bad documents of one piece."""
        return join(self.passages, f"{split:06d}.bad.json")

    def partition_file(self, partition: int) -> str:
        """Occurrences of one unit."""
        return join(self.occurrences, f"{partition:06d}.records")

    def label_file(self, partition: int) -> str:
        """Labels of one unit."""
        return join(self.labels, f"{partition:06d}.safetensors")

    def curves_file(self, shard: int) -> str:
        """What is known of the tokens of one shard: variance curves, or with mcl numbers of senses."""
        return join(self.senses_folder, f"{shard:06d}.safetensors")

    def shard_file(self, shard: int) -> str:
        """Centroids of one shard of token ids."""
        return join(self.centroids, f"{shard:06d}.safetensors")

    def token_file(self, token: int) -> str:
        """Centroids of one token that was cut into parts."""
        return join(self.centroids, f"token-{token:08d}.safetensors")

    def round_file(self, token: int) -> str:
        """Centroids of such a token after its latest round: the resume point."""
        return join(self.centroids, f"token-{token:08d}-round.safetensors")

    def is_round(self, name: str) -> bool:
        """Tell whether a file of the centroids' folder is a `round_file`, or its marker."""
        return "-round.safetensors" in name

    def contexts_file(self, partition: int) -> str:
        """Contexts of the exemplars that lie in one unit."""
        return join(self.contexts, f"{partition:06d}.parquet")


def resolve_output(output: str) -> str:
    """Return an output as an absolute URI.

    Raises:
        InputError: it would go with the job: one of `ray job submit` runs in a copy of its working directory that Ray removes.
    """
    if (
        SUBMITTED in os.environ
        and filesystems.is_local(output)
        and not Path(output.removeprefix("file://")).is_absolute()
    ):
        raise InputError(
            f"--output {output} is relative, and a submitted job runs in a copy of its working directory that Ray removes: "
            "give an absolute path or a URI that every node can reach"
        )
    return storage.absolute(output)


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Hold a run folder on a local disk or on S3 against a second driver.

    Raises:
        InputError: another driver holds it.
    """
    if not filesystems.is_local(run.root):
        with leased(run.lock) if is_s3(run.root) else nullcontext():
            yield
        return
    with storage.write_errors(run.root):
        storage.make_folder(run.root)
    holder = Path(run.holder)
    try:
        lock = FileLock(run.lock, timeout=0).acquire()
    except Timeout as error:
        told = holder.read_text(encoding="utf-8") if holder.is_file() else "not known which"
        raise InputError(
            f"another driver works on {run.root} ({told}): wait for it, or give another --output"
        ) from error
    with lock:
        holder.write_text(f"process {os.getpid()} on host {socket.gethostname()}", encoding="utf-8")
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)


def remove_temp_files(run: RunFolder) -> None:
    """Remove the temporary files of processes that were killed while they wrote into a run folder on a local disk."""
    if not filesystems.is_local(run.root):
        return
    ours = {
        Path(name).name
        for name in (
            run.manifest,
            run.journal,
            run.summary,
            run.tokenizer,
            run.bad_documents,
            run.finished,
            run.partitions,
        )
    }
    found = [p for p in Path(run.root).glob(".*.part") if p.name[1:].rpartition(".")[0].rpartition(".")[0] in ours]
    for folder in run.outputs()[:-1]:
        found += Path(folder).rglob(".*.part")
    for left in filter(is_scratch, found):
        left.unlink(missing_ok=True)
