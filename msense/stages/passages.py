"""Stage 1: cut the documents of a corpus into passages, one task per input split, and list its bad documents.

Corpus files are always read in a process of their own, so that a file which crashes its reader does not end the run.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from msense.constants import LISTED_BAD_DOCUMENTS
from msense.corpus import (
    WHOLE,
    InputSplit,
    SourceFile,
    count_rows,
    current_fingerprint,
    cut_splits,
    display_uri,
    number_splits,
)
from msense.corpus.chunking import write_passages
from msense.corpus.passages import PassageOptions, PassageSpec
from msense.errors import InputError
from msense.io import storage
from msense.run.folder import RunFolder
from msense.run.resume import finished
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import Stage, StageContext
from msense.teacher.spec import TeacherInfo


@dataclass(frozen=True)
class PassageStats:
    """The passages of a corpus."""

    documents: int
    passages: int
    tokens: int
    bad_documents: dict[str, int] = field(default_factory=dict)  # by reason

    @classmethod
    def from_summary(cls, stats: dict[str, Any]) -> "PassageStats":
        """Read the stats in the summary of a run; older versions have one key per reason."""
        old = {key.removeprefix("bad: "): count for key, count in stats.items() if key.startswith("bad: ")}
        return cls(stats["documents"], stats["passages"], stats["tokens"], stats.get("bad_documents", old))

    def check_bad_documents(self, on_bad_document: str) -> None:
        """Raise InputError if there are bad documents and `on_bad_document` is "fail"."""
        if self.bad_documents and on_bad_document == "fail":
            raise InputError(
                f"the corpus has bad documents ({self.reasons()}): correct them, or use --on-bad-document skip"
            )

    def reasons(self) -> str:
        """Return the number of bad documents by reason, for messages."""
        return "; ".join(f"{count} {reason}" for reason, count in self.bad_documents.items())


def passage_spec(info: TeacherInfo, options: PassageOptions) -> PassageSpec:
    """Return how a teacher's passages are cut; raise InputError for a stride or prompt that leaves no room."""
    own: dict[str, Any] = {name: getattr(options, name) for name in PassageOptions.model_fields}
    own |= {"prompt_text": info.prompt, "skip_frame": info.decoder, "include_frame": info.include_frame}
    return PassageSpec(info.max_length, info.prefix, info.suffix, info.prompt_ids, info.excluded, **own)


class PassageStage(Stage[PassageStats]):
    """Writes the passages files; `blocks` has the number of blocks of every file once the stage has run."""

    name = "passages"

    def __init__(
        self,
        run: RunFolder,
        spec: PassageSpec,
        files: Sequence[SourceFile],
        corpus: Sequence[str],
        on_bad_document: str = "skip",
    ) -> None:
        """Cut the files of a corpus, which messages name as it was given."""
        self.splits = cut_splits(files)
        super().__init__(run, [run.passages_file(number) for number in range(len(self.splits))])
        self.spec, self.corpus, self.on_bad_document = spec, corpus, on_bad_document
        self.blocks: list[int] = []
        self.known = {file.uri: f"{file.size} {file.fingerprint}" for file in files}

    def finished(self, context: StageContext) -> list[Row | None]:
        """Return the stats of finished splits; those with bad documents need their list as well."""
        done = super().finished(context)
        listed = [number for number, stats in enumerate(done) if stats and stats["bad"]]
        lists = finished(self.name, self.run, [self.run.bad_file(number) for number in listed], context.executor)
        for number, stats in zip(listed, lists, strict=True):
            done[number] = done[number] if stats is not None else None
        self.splits = _with_row_numbers(self.splits, context.executor)
        return done

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Write the passages of the missing splits."""
        splits = ((number, self.splits[number]) for number in missing)
        items = [{"number": n, "known": self.known[split.uri], **asdict(split)} for n, split in splits]
        fail_on_bad = self.on_bad_document == "fail"
        return executor.map(self.name, _write_split, items, self.run, self.spec, fail_on_bad, isolated=True)

    def reduce(self, executor: Executor, stats: list[Row]) -> PassageStats:
        """Add up the splits and list bad documents; raise InputError if there is no text, or one where none is allowed."""
        bad: list[Counter[str]] = [Counter(row["bad"]) for row in stats]
        totals = {name: sum(row[name] for row in stats) for name in ("documents", "passages", "tokens")}
        result = PassageStats(**totals, bad_documents=dict(sorted(sum(bad, Counter[str]()).items())))
        result.check_bad_documents(self.on_bad_document)
        executor.run(_list_bad_documents, self.run, bad)
        if not result.passages:
            names, reasons = " ".join(map(display_uri, self.corpus)), result.reasons() or "it has no documents"
            listed = f"see {self.run.bad_documents}, and check the path and --text-column"
            remedy = listed if result.bad_documents else "check the path"
            sample = f", and raise --sample {self.spec.sample}" if self.spec.sample < 1 else ""
            raise InputError(f"the corpus {names} has no text ({reasons}): {remedy}{sample}")
        self.blocks = [row["blocks"] for row in stats]
        return result


def _with_row_numbers(splits: list[InputSplit], executor: Executor) -> list[InputSplit]:
    """Return the splits with the number of rows before each one of a file that was cut by bytes."""
    unknown = [n for n, split in enumerate(splits) if split.format in ("txt", "jsonl") and split.stop != WHOLE]
    if not unknown:
        return splits
    counts = [0] * len(splits)
    items = [{"number": n, **asdict(splits[n])} for n in unknown]
    for row in executor.map("counting rows", _count_split, items, isolated=True):
        counts[row["number"]] = row["rows"]
    return number_splits(splits, counts)


def _count_split(item: Row) -> Row:
    number = item.pop("number")
    return {"number": number, "rows": count_rows(InputSplit(**item))}


def _write_split(item: Row, run: RunFolder, spec: PassageSpec, fail_on_bad: bool) -> Row:
    """Write the passages of one split, its list of bad documents first, unless its file changes meanwhile."""
    number, known = item.pop("number"), item.pop("known")
    tokenizer = Tokenizer.from_str(storage.read_text(run.tokenizer))

    def write(path: Path) -> Row:
        split = InputSplit(**item)
        stats = write_passages(split, spec, tokenizer, path, fail_on_bad)
        if (now := current_fingerprint(split.uri)) not in (None, known):
            raise InputError(
                f"the corpus changed while it was read: {split.name} was {known}, is now {now}; restore the file and run "
                "the same command again, or use another --output"
            )
        if listed := stats.pop("listed"):
            text = json.dumps(listed)
            run.publish(run.bad_file(number), lambda path: path.write_text(text, encoding="utf-8"))
        return {**stats, "blocks": len(stats["blocks"])}

    return run.publish(run.passages_file(number), write, {"number": number})


def _list_bad_documents(run: RunFolder, bad: list[Counter[str]]) -> None:
    """Write the first hundred bad documents of each reason, in input order, given the numbers of every split."""
    counts: Counter[str] = Counter()
    lines = []
    for split, reasons in enumerate(bad):
        if all(counts[reason] >= LISTED_BAD_DOCUMENTS for reason in reasons):
            continue
        for document in json.loads(storage.read_text(run.bad_file(split))):
            counts[document["reason"]] += 1
            if counts[document["reason"]] <= LISTED_BAD_DOCUMENTS:
                lines.append(json.dumps(document))
    storage.write_text(run.bad_documents, "".join(line + "\n" for line in lines))
