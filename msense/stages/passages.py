"""Stage 1: cut the documents of a corpus into passages, one task per input split, and list its bad documents.

Corpus files are always read in a process of their own, so that a file which crashes its reader does not end the run.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

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
from msense.corpus.chunking import LISTED_BAD_DOCUMENTS, write_passages
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
    return PassageSpec(
        max_length=info.max_length,
        prefix=info.prefix,
        suffix=info.suffix,
        prompt=info.prompt_ids,
        excluded=info.excluded,
        stride=options.stride,
        seed=options.seed,
        dedup=options.dedup,
        text_column=options.text_column,
        sample=options.sample,
    )


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
        super().__init__(run)
        self.spec, self.corpus, self.on_bad_document = spec, corpus, on_bad_document
        self.splits = cut_splits(files)
        self.blocks: list[int] = []
        self.known = {file.uri: f"{file.size} {file.fingerprint}" for file in files}

    def outputs(self) -> list[str]:
        """Return one passages file per input split."""
        return [self.run.passages_file(number) for number in range(len(self.splits))]

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
        yield from executor.map(self.name, _write_split, items, self.run, self.spec, fail_on_bad, isolated=True)

    def reduce(self, executor: Executor, stats: list[Row]) -> PassageStats:
        """Add up the splits and write the list of bad documents.

        Raises:
            InputError: the corpus has no text, or a bad document where none is allowed.
        """
        bad: Counter[str] = Counter()
        for row in stats:
            bad.update(row["bad"])
        totals = {name: sum(row[name] for row in stats) for name in ("documents", "passages", "tokens")}
        result = PassageStats(**totals, bad_documents=dict(sorted(bad.items())))
        result.check_bad_documents(self.on_bad_document)
        executor.run(_list_bad_documents, self.run, len(stats))
        if not result.passages:
            raise InputError(self._no_text(result))
        self.blocks = [row["blocks"] for row in stats]
        return result

    def _no_text(self, result: PassageStats) -> str:
        names = " ".join(display_uri(uri) for uri in self.corpus)
        remedy = (
            f"see {self.run.bad_documents}, and check the path and --text-column"
            if result.bad_documents
            else "check the path"
        )
        if self.spec.sample < 1:
            remedy += f", and raise --sample {self.spec.sample}"
        return f"the corpus {names} has no text ({result.reasons() or 'it has no documents'}): {remedy}"


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
            run.publish(run.bad_file(number), partial(_write_listed, listed))
        return {**stats, "blocks": len(stats["blocks"])}

    return run.publish(run.passages_file(number), write, {"number": number})


def _write_listed(listed: list[dict[str, str]], path: Path) -> None:
    path.write_text(json.dumps(listed), encoding="utf-8")


def _list_bad_documents(run: RunFolder, splits: int) -> None:
    """Write the first hundred bad documents of each reason, in input order."""
    counts: Counter[str] = Counter()
    lines = []
    for split in range(splits):
        stats: dict[str, Any] = storage.stats_of(run.passages_file(split)) or {"bad": {}}
        if all(counts[reason] >= LISTED_BAD_DOCUMENTS for reason in stats["bad"]):
            continue
        for document in json.loads(storage.read_text(run.bad_file(split))):
            counts[document["reason"]] += 1
            if counts[document["reason"]] <= LISTED_BAD_DOCUMENTS:
                lines.append(json.dumps(document))
    storage.write_text(run.bad_documents, "".join(line + "\n" for line in lines))
