"""Write the contexts of the exemplars, the points nearest to each centroid, which clustering keeps as positions.

A context is the original text around the whole word that a token is part of. Passages are read again, one partition per task,
but no documents; the final merge holds all exemplars (about 300 bytes each).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from msense.clustering.selection import PLACE
from msense.corpus.passages import token_places
from msense.dictionary.contexts import exemplar_schema, write_exemplars
from msense.io import storage
from msense.io.arrays import load_arrays, open_parquet
from msense.run.folder import RunFolder
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import Stage
from msense.stages.embedding_store import Duplicates, Partition
from msense.text import excerpt, word_borders

LONGEST_TEXT = 4096  # characters
CONTEXT_TOKENS = 24  # tokens of context on each side, where only tokens are known
# of passages; runs of older versions lack the last ones
_COLUMNS = ("document_id", "input_ids", "text", "gaps", "lengths")


class ExemplarStage(Stage[list[str]]):
    """Writes the contexts of all exemplars; the result is their files, one per partition."""

    name = "exemplars"

    def __init__(self, run: RunFolder, centroid_files: Sequence[str], partitions: Sequence[Partition]) -> None:
        super().__init__(run, [run.contexts_index, *(run.contexts_file(p.number) for p in partitions)])
        self.centroid_files, self.partitions = centroid_files, partitions

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Write the index of the exemplars' positions if it is missing, then the missing files."""
        if 0 in missing:
            executor.run(_write_index, self.run, self.centroid_files, len(self.partitions))
            yield {"number": 0}
        items = [asdict(self.partitions[number - 1]) for number in missing if number]
        yield from executor.map(self.name, _write_partition, items, self.run)

    def reduce(self, executor: Executor, stats: list[Row]) -> list[str]:
        """Return the files of the partitions."""
        return self.outputs[1:]


def _write_index(run: RunFolder, centroid_files: Sequence[str], partitions: int) -> None:
    """Write the positions of all exemplars with one row group per partition."""
    arrays = [load_arrays(file, tuple(f"exemplar_{name}" for name in PLACE)) for file in centroid_files]
    columns = {name: np.concatenate([a[f"exemplar_{name}"] for a in arrays]) for name in PLACE}
    order = np.argsort(columns["unit"], kind="stable")
    table = pa.table({name: column[order] for name, column in columns.items()})
    borders = np.searchsorted(columns["unit"][order], np.arange(partitions + 1)).tolist()

    def write(path: Path) -> None:
        with pq.ParquetWriter(path, table.schema) as writer:
            for start, stop in pairwise(borders):
                writer.write_table(table.slice(start, stop - start), row_group_size=max(1, stop - start))

    run.publish(run.contexts_index, write)


def _write_partition(item: Row, run: RunFolder) -> Row:
    """Write the contexts of one partition's exemplars."""
    partition, schema = Partition(**item), exemplar_schema()
    tokenizer = Tokenizer.from_str(storage.read_text(run.tokenizer))
    places = open_parquet(run.contexts_index).read_row_group(partition.number)
    rows, positions = places.column("row").to_pylist(), places.column("position").to_pylist()
    passages = _passages(run, partition, np.unique(np.array(rows, np.int64)))
    texts = []
    for row, position in zip(rows, positions, strict=True):
        left, *others = context_of(tokenizer, passages[row], position)
        texts.append((left[-LONGEST_TEXT:], *(text[:LONGEST_TEXT] for text in (*others, passages[row].document_id))))
    columns = {name: places.column(name) for name in PLACE[:4]}
    columns["distance"] = pc.sqrt(columns["distance"])  # squared until here: the roots of unequal squares may be equal
    for number, name in enumerate(schema.names[4:]):
        columns[name] = pa.array([text[number] for text in texts], pa.string())
    run.publish(run.contexts_file(partition.number), lambda path: pq.write_table(pa.table(columns).cast(schema), path))
    return {"number": partition.number + 1}


@dataclass(frozen=True)
class Passage:
    """A passage with the characters [start, stop) of its text that each of its L tokens stands for."""

    document_id: str
    ids: list[int]
    text: str
    starts: np.ndarray  # int64 [L]
    stops: np.ndarray  # int64 [L]
    borders: Sequence[int]  # of the text's words

    @classmethod
    def of_row(cls, row: Row) -> "Passage":
        """Return a row of a passages file; without places if those of its tokens are unknown."""
        starts, stops = token_places(*(np.array(row.get(name, ()), np.int64) for name in ("gaps", "lengths")))
        text = row.get("text", "")
        return cls(row["document_id"], row["input_ids"], text, starts, stops, word_borders(text))


def _passages(run: RunFolder, partition: Partition, wanted: np.ndarray) -> dict[int, Passage]:
    """Return the passages in the sorted rows `wanted` of a partition, by row."""
    duplicates, start = Duplicates(run), 0
    passages: dict[int, Passage] = {}
    for split, block in zip(partition.splits, partition.blocks, strict=True):
        table = open_parquet(run.passages_file(split)).read_row_group(block, columns=list(_COLUMNS))
        kept = np.delete(np.arange(len(table)), duplicates.of(split, block))
        rows = wanted[(wanted >= start) & (wanted < start + len(kept))]
        read = map(Passage.of_row, table.take(kept[rows - start]).to_pylist())
        passages.update(zip(rows.tolist(), read, strict=True))
        start += len(kept)
    return passages


def context_of(tokenizer: Tokenizer, passage: Passage, position: int) -> tuple[str, str, str]:
    """Return the original text (left, word, right) around the whole word that the token at a position is part of.

    The text is that of the passage alone, without the tokens of the passage before that --stride repeats as context. The word
    of a token without text, such as [CLS], is the token. If no token of the passage has a place in its text, all
    three are decoded.
    """
    if not (passage.stops > passage.starts).any():
        return decoded_context(tokenizer, passage.ids, position)
    start, stop = int(passage.starts[position]), int(passage.stops[position])
    left, word, right = excerpt(passage.text, passage.borders, start, stop)
    return left, word or tokenizer.decode([passage.ids[position]], skip_special_tokens=False), right


def decoded_context(tokenizer: Tokenizer, ids: list[int], position: int) -> tuple[str, str, str]:
    """Return the decoded text (left, token, right) around a position.

    The three are differences of growing decodings of the same window, which preserves the spaces of the text.
    """
    start, stop = max(0, position - CONTEXT_TOKENS), position + 1 + CONTEXT_TOKENS
    special = bool(tokenizer.decode([ids[position]], skip_special_tokens=True) == "")
    left = tokenizer.decode(ids[start:position])
    upto = tokenizer.decode(ids[start : position + 1], skip_special_tokens=not special)
    whole = tokenizer.decode(ids[start:stop], skip_special_tokens=not special)
    if upto.startswith(left) and whole.startswith(upto) and len(upto) > len(left):
        return left, upto[len(left) :], whole[len(upto) :]
    word = tokenizer.decode([ids[position]], skip_special_tokens=False)
    return left, word, tokenizer.decode(ids[position + 1 : stop])


def collect_contexts(files: list[str], target: Path) -> None:
    """Merge the contexts of all partitions into one local file, sorted by token, sense and rank."""
    table = pa.concat_tables([open_parquet(file).read() for file in files])
    table = table.sort_by([(name, "ascending") for name in ("token", "sense", "rank")])
    write_exemplars(table, target)
