"""Stage 1 on Ray: the corpus in, passages files and the list of bad documents out, a task a piece of the corpus.

A task holds what `tokens.write_passages` holds; the driver a few counts a piece.
"""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from msense.config.build import BuildConfig
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
from msense.corpus.passages import PassageSpec
from msense.errors import InputError
from msense.io import storage
from msense.run.folder import RunFolder
from msense.run.journal import Journal
from msense.run.resume import finished
from msense.runtime.ray_executor import map_data, map_tasks, run_task
from msense.runtime.resources import Resources


def make_passages(
    run: RunFolder,
    config: BuildConfig,
    spec: PassageSpec,
    files: list[SourceFile],
    resources: Resources,
    journal: Journal,
) -> tuple[dict[str, Any], list[int]]:
    """Write the passages of a corpus; pieces that an earlier driver finished are kept.

    Args:
        run: the run folder, with the tokenizer in it.
        config: the build's settings.
        spec: how to cut passages.
        files: the corpus.
        resources: how many tasks at a time.
        journal: where to note what is kept and what is made.

    Returns:
        Facts (documents, passages, tokens, bad documents in all and by reason), and the number of blocks of every
        passages file.

    Raises:
        BadInput: no text at all; a bad document where none is allowed; the corpus changed while it was read.
    """
    splits = _numbered(cut_splits(files), resources)
    found = _finished_pieces(run, len(splits), resources, journal)
    known = {file.uri: f"{file.size} {file.fingerprint}" for file in files}
    todo = [{"number": n, "known": known[p.uri], **asdict(p)} for n, p in enumerate(splits) if found[n] is None]
    work = partial(_write_piece, run=run, spec=spec, fail_on_bad=config.on_bad_document == "fail")
    for row in map_data("passages", work, todo, resources):
        found[row["number"]] = row
    journal.add("passages", made=len(todo))
    whole = [f for f in found if f is not None]
    bad: dict[str, int] = {}
    for row in whole:
        for reason, count in row["bad"].items():
            bad[reason] = bad.get(reason, 0) + count
    stats = {name: sum(row[name] for row in whole) for name in ("documents", "passages", "tokens")}
    stats |= {"bad documents": sum(bad.values())}
    stats |= {f"bad: {reason}": count for reason, count in sorted(bad.items())}
    refuse_bad_documents(stats, config)
    run_task(_list_bad_documents, run, len(whole))
    if not stats["passages"]:
        named = " ".join(display_uri(uri) for uri in config.corpus)
        told = _told(stats)
        remedy = f"see {run.bad_documents}, and check the path and --text-column" if bad else "check the path"
        if config.sample < 1:
            remedy += f", and raise --sample {config.sample}"
        raise InputError(f"the corpus {named} has no text ({told or 'no documents in it'}): {remedy}")
    return stats, [row["blocks"] for row in whole]


def refuse_bad_documents(stats: dict[str, Any], config: BuildConfig) -> None:
    """Raise if there are bad documents and the config allows none.

    Raises:
        BadInput: with their number by reason.
    """
    if stats["bad documents"] and config.on_bad_document == "fail":
        raise InputError(f"the corpus has bad documents ({_told(stats)}); --on-bad-document skip goes past them")


def _told(stats: dict[str, Any]) -> str:
    """Say how many bad documents there are of each reason."""
    reasons = ((name.removeprefix("bad: "), count) for name, count in stats.items() if name.startswith("bad: "))
    return "; ".join(f"{count} {reason}" for reason, count in reasons)


def _finished_pieces(
    run: RunFolder, splits: int, resources: Resources, journal: Journal
) -> list[dict[str, Any] | None]:
    """Return the facts of the pieces that are finished; those with bad documents need their list as well."""
    found = finished("passages", run, [run.passages_file(n) for n in range(splits)], resources, journal)
    listed = [n for n, f in enumerate(found) if f and f["bad"]]
    lists = finished("passages", run, [run.bad_file(n) for n in listed], resources)
    for number in [n for n, f in zip(listed, lists, strict=True) if f is None]:
        found[number] = None
    return found


def _numbered(splits: list[InputSplit], resources: Resources) -> list[InputSplit]:
    """Count the rows before each piece of a file that was cut by bytes."""
    unknown = [n for n, split in enumerate(splits) if split.format in ("txt", "jsonl") and split.stop != WHOLE]
    if not unknown:
        return splits
    counts = [0] * len(splits)
    for row in map_tasks(
        "counting rows", _count_piece, [{"number": n, **asdict(splits[n])} for n in unknown], resources
    ):
        counts[row["number"]] = row["rows"]
    return number_splits(splits, counts)


def _count_piece(item: dict[str, Any]) -> dict[str, Any]:
    number = item.pop("number")
    return {"number": number, "rows": count_rows(InputSplit(**item))}


def _write_piece(item: dict[str, Any], run: RunFolder, spec: PassageSpec, fail_on_bad: bool) -> dict[str, Any]:
    """Write the passages of one piece, its list of bad documents first, unless its file changes meanwhile."""
    number, known = item.pop("number"), item.pop("known")
    tokenizer = Tokenizer.from_str(storage.read_text(run.tokenizer))

    def write(path: Path) -> dict[str, Any]:
        split = InputSplit(**item)
        stats = write_passages(split, spec, tokenizer, path, fail_on_bad)
        if (now := current_fingerprint(split.uri)) not in (None, known):
            raise InputError(
                f"the corpus changed while it was read: {split.name} was {known}, is {now}; bring the former file "
                "back and run the same command again, or give another --output"
            )
        if listed := stats.pop("listed"):
            run.publish(run.bad_file(number), partial(_write_listed, listed))
        return {**stats, "blocks": len(stats["blocks"])}

    return run.publish(run.passages_file(number), write, {"number": number})


def _write_listed(listed: list[dict[str, str]], path: Path) -> None:
    path.write_text(json.dumps(listed), encoding="utf-8")


def _list_bad_documents(run: RunFolder, splits: int) -> None:
    """Write the first hundred bad documents of each reason, in input order."""
    told: dict[str, int] = {}
    lines = []
    for split in range(splits):
        stats = storage.stats_of(run.passages_file(split)) or {"bad": {}}
        if not any(told.get(reason, 0) < LISTED_BAD_DOCUMENTS for reason in stats["bad"]):
            continue
        for document in json.loads(storage.read_text(run.bad_file(split))):
            told[document["reason"]] = told.get(document["reason"], 0) + 1
            if told[document["reason"]] <= LISTED_BAD_DOCUMENTS:
                lines.append(json.dumps(document))
    storage.write_text(run.bad_documents, "".join(line + "\n" for line in lines))
