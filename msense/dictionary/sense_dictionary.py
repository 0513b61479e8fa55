"""The sense dictionary: for every token of a vocabulary, the centroids of its contextual embeddings.

Comes in: a folder, or token ids [N] and embeddings [N, D] in memory. Goes out: senses, sense numbers [N], replaced
embeddings [N, D], or a folder. A loaded dictionary maps its centroids from disk and holds the small arrays (20 bytes a
sense, 16 a token); `fit` and `merge` hold everything.
"""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from msense.config import DEFAULT_BUDGET, Metric, SenseBudget
from msense.dictionary import assignment
from msense.dictionary.arguments import checked, target_of, whole_number
from msense.dictionary.assignment import RaggedSenses
from msense.dictionary.contexts import exemplar_schema, read_exemplars
from msense.dictionary.format import (
    Arrays,
    DictionaryConfig,
    DictionaryFiles,
    Stored,
    TeacherName,
    atomic_path,
    copy_file,
    write_dictionary,
)
from msense.dictionary.lookup import Exemplar, Match, Vocabulary, read_vocabulary
from msense.dictionary.making import cluster_in_memory, unite, unite_exemplars
from msense.dictionary.reader import open_dictionary
from msense.errors import BadInput, DictionaryError
from msense.kmeans import KMeansConfig
from msense.mcl import MclConfig

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "Arrays",
    "DictionaryConfig",
    "DictionaryFiles",
    "SenseDictionary",
    "Senses",
    "TeacherName",
    "write_dictionary",
]

ArrayT = TypeVar("ArrayT", np.ndarray, Tensor)
_SAVE_BYTES = 64 << 20
_SMALLEST, _LARGEST = 1e-37, 1e38  # of float32 numbers to divide by


class Senses(NamedTuple):
    """The K senses of one token."""

    centroids: Tensor  # float32 [K, D]
    counts: np.ndarray  # int64 [K], points clustered into each
    spread: np.ndarray  # float32 [K], root mean squared distance of these points


class SenseDictionary:
    """All senses of a teacher's vocabulary; `len` gives their number S.

    Make one with `load`, `fit` or `merge`.

    Attributes:
        config: what the dictionary is of.
        ragged: the senses as the functions of `assignment` take them.
        offsets: int64 [V+1]; senses offsets[t] to offsets[t + 1] belong to token t.
        counts: int64 [S].
        spread: float32 [S].
        token_counts: int64 [V], occurrences in the whole corpus.
    """

    def __init__(
        self,
        config: DictionaryConfig,
        arrays: Arrays,
        centroids: tuple[Tensor, ...],
        files: DictionaryFiles | None = None,
        exemplars: "pa.Table | None" = None,
        scales: Tensor | None = None,
    ) -> None:
        """Put checked arrays together.

        Args:
            config: what they are of.
            arrays: the small arrays.
            centroids: tensors [S_i, D], one after the other.
            files: the folder in which the tokenizer and, unless given, the exemplars are.
            exemplars: rows of `exemplar_schema()`.
            scales: float32 [S], of centroids in int8.
        """
        self.config = config
        self.offsets, self.counts, self.spread, self.token_counts = arrays
        self.ragged = RaggedSenses(self.offsets, centroids, scales)
        self._files = files
        self._exemplars = exemplars

    def __len__(self) -> int:
        return len(self.counts)

    def __repr__(self) -> str:
        c = self.config
        of = f"{c.vocab_size:,} tokens, dim {c.dim}, {c.dtype}, {c.metric}, teacher {c.teacher.name!r}"
        return f"SenseDictionary({len(self):,} senses of {of})"

    @property
    def dim(self) -> int:
        """Width D of embeddings and senses."""
        return self.config.dim

    @property
    def vocab_size(self) -> int:
        """Number V of tokens, with and without senses."""
        return self.config.vocab_size

    @property
    def centroids(self) -> Tensor:
        """All senses [S, D] in the stored dtype; mapped, but in memory when they lie in several files, or in int8."""
        parts = self.ragged.floats()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @classmethod
    def load(cls, source: str | Path) -> "SenseDictionary":
        """Open a dictionary; its centroids are mapped, not read.

        Args:
            source: a dictionary's folder, a run folder that holds one, or a URI (copied to the user's cache).

        Raises:
            DictionaryError: a file is missing, truncated, foreign, leads out of the folder or contradicts another. That
                the centroids are finite is checked when they are used.
        """
        if "://" in str(source):
            from msense import storage

            inside = storage.join(str(source), "dictionary")
            of_run = storage.exists(storage.join(inside, "config.json"))
            source = storage.local_copy(inside if of_run else str(source))
        folder = Path(source)
        inner = folder / "dictionary"
        if not os.path.lexists(DictionaryFiles(folder).config) and os.path.lexists(DictionaryFiles(inner).config):
            folder = inner
        config, arrays, centroids, scales = open_dictionary(folder)
        return cls(config, arrays, centroids, DictionaryFiles(folder), scales=scales)

    def save(self, folder: str | Path, dtype: Stored | None = None) -> None:
        """Write the dictionary with its tokenizer, exemplars and model card; one that is there is replaced.

        Args:
            folder: a local one.
            dtype: of the centroids; default: as they are. int8 takes D + 4 bytes a sense, and each number is off by at
                most 1/254 of the largest of its sense.

        Raises:
            BadInput: the folder is a URI, or the dtype is none.
            DictionaryError: arrays were changed so that they contradict each other, or centroids are too large for the dtype.
        """
        if dtype not in (None, *get_args(Stored)):
            raise BadInput(f"dtype is {dtype!r}, but must be one of {get_args(Stored)}")
        if "://" in str(folder):
            raise BadInput(f"{folder} is not a local folder: save to one, then copy it there")
        files = DictionaryFiles(Path(folder))
        files.folder.mkdir(parents=True, exist_ok=True)
        files.config.unlink(missing_ok=True)
        if self._exemplars is not None:
            import pyarrow.parquet as pq

            with atomic_path(files.exemplars) as scratch:
                pq.write_table(self._exemplars, scratch, row_group_size=1 << 16, write_statistics=["token"])
        else:
            copy_file(self._optional("exemplars"), files.exemplars)
        if not files.tokenizer.resolve().is_relative_to(files.folder.resolve()):
            raise DictionaryError(
                f"{files.tokenizer} lies in {files.tokenizer.resolve()}, outside the folder: take that link away first"
            )
        copy_file(self._optional("tokenizer"), files.tokenizer)
        config = self.config.model_copy(update={"dtype": dtype or self.config.dtype})
        write_dictionary(files.folder, config, *self._arrays, _chunks(self.ragged))

    def to(self, device: str | torch.device) -> "SenseDictionary":
        """Return this dictionary with its centroids on a device (2·S·D bytes there for float16)."""
        parts = tuple(part.to(device) for part in self.ragged.parts)
        scales = None if self.ragged.scales is None else self.ragged.scales.to(device)
        return SenseDictionary(self.config, self._arrays, parts, self._files, self._exemplars, scales)

    def senses(self, token: int) -> Senses:
        """Return the senses of a token; K = 0 for a token without any.

        Raises:
            BadInput: the token is not in the vocabulary.
            DictionaryError: a centroid of the token is not finite.
        """
        if not 0 <= token < self.vocab_size:
            raise BadInput(f"token {token} is not in the vocabulary: it has the tokens 0 to {self.vocab_size - 1}")
        start, end = self.offsets[token : token + 2].tolist()
        centroids = self.ragged.rows(torch.arange(start, end)).float()
        if not torch.isfinite(centroids).all():
            raise DictionaryError(
                f"a sense of token {token} is NaN or infinite: the dictionary is damaged; build it again"
            )
        return Senses(centroids, self.counts[start:end], self.spread[start:end])

    def find(self, word: str) -> Match:
        """Look up the tokens of a word under the tokenizer's variants of it (`bank`, `Ġbank`, `▁bank`, `Bank`).

        Raises:
            BadInput: the dictionary has no tokenizer.
            DictionaryError: its tokenizer.json is damaged, or that of another tokenizer.
        """
        return self._vocabulary.find(word, np.diff(self.offsets))

    def exemplars(self, token: int) -> list[Exemplar]:
        """Return the example contexts of a token's senses, by sense and rank; none if the dictionary keeps none.

        Raises:
            DictionaryError: exemplars.parquet is damaged, foreign or does not fit the senses.
        """
        rows = (Exemplar(*(row[name] for name in Exemplar._fields)) for row in self._exemplar_table(token).to_pylist())
        return sorted(rows, key=lambda exemplar: exemplar[:2])

    def assign(self, token_ids: ArrayT, embeddings: ArrayT, *, metric: Metric | None = None) -> ArrayT:
        """Return the number of each embedding's nearest sense among its own token's; ties go to the lowest.

        Args:
            token_ids: integers [N].
            embeddings: floating point [N, D].
            metric: l2, dot or cosine; default: the dictionary's.

        Returns:
            int64 [N], as NumPy or torch like the embeddings; -1 for tokens that have no senses or are not in the
            vocabulary.

        Raises:
            BadInput: shapes or types do not fit, or an embedding is NaN or infinite.
        """
        ids, points = self._checked(token_ids, embeddings)
        found = assignment.assign(ids, points, self.ragged, metric or self.config.metric)
        return found if isinstance(embeddings, Tensor) else found.numpy()

    def replace(
        self,
        token_ids: ArrayT,
        embeddings: ArrayT,
        temperature: float | None = None,
        out: ArrayT | None = None,
        *,
        metric: Metric | None = None,
    ) -> ArrayT:
        """Replace embeddings by senses of their own token.

        Args:
            token_ids: integers [N].
            embeddings: floating point [N, D].
            temperature: None for the nearest sense; else the mean of the token's senses weighted by
                softmax(scores / (temperature · unit)), the scores being minus the squared distance, the dot product or
                the cosine. The unit is the dictionary's mean squared spread for all three metrics.
            out: where to write, like the embeddings; may be the embeddings themselves.
            metric: l2, dot or cosine; default: the dictionary's.

        Returns:
            [N, D] in the embeddings' dtype; those of tokens without senses are unchanged.

        Raises:
            BadInput: shapes, types or the temperature do not fit, or an embedding is NaN or infinite.
        """
        ids, points = self._checked(token_ids, embeddings)
        scale = None if temperature is None else self._scale(temperature)
        target = None if out is None else target_of(out, embeddings)
        found = assignment.replace(ids, points, self.ragged, metric or self.config.metric, scale or None, target)
        if out is not None:
            return out
        return found if isinstance(embeddings, Tensor) else found.numpy()

    def weigh(
        self, token_ids: Tensor, embeddings: Tensor, top: int, temperature: float, *, metric: Metric | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return each embedding's `top` nearest senses and their weights, as `assignment.weigh`.

        Args:
            token_ids: integers [N].
            embeddings: floating point [N, D].
            top: how many senses, M.
            temperature: of the weights, as in `replace`.
            metric: l2, dot or cosine; default: the dictionary's.
        """
        ids, points = self._checked(token_ids, embeddings)
        scale = max(self._scale(temperature), _SMALLEST)
        return assignment.weigh(ids, points, self.ragged, metric or self.config.metric, scale, top)

    def _scale(self, temperature: float) -> float:
        """Return what scores are divided by; 0 takes the nearest sense, as where every sense is a single point."""
        if not 0 < temperature < float("inf"):
            raise BadInput(
                f"the temperature is {temperature}, but must be above 0 and finite; None takes the nearest sense"
            )
        scale = temperature * self.config.temperature_unit
        return min(scale, _LARGEST) if scale > _SMALLEST else 0.0  # beyond float32 the weights would be NaN

    @property
    def fingerprint(self) -> str:
        """The sha256 of config and arrays of a loaded dictionary, in hexadecimal; reads its files."""
        if self._files is None:
            raise BadInput("this dictionary lies in no folder: save it and load it again")
        return self._files.fingerprint()

    @classmethod
    def fit(  # noqa: PLR0913 - the few settings that a build without files has, all but two by name
        cls,
        token_ids: np.ndarray | Tensor,
        embeddings: np.ndarray | Tensor,
        *,
        k: int | SenseBudget | MclConfig = DEFAULT_BUDGET,
        metric: Metric = "l2",
        seed: int = 0,
        vocab_size: int | None = None,
        max_occurrences: int = 0,
        dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    ) -> "SenseDictionary":
        """Cluster embeddings in memory.

        Args:
            token_ids: integers [N], in any order.
            embeddings: floating point [N, D].
            k: senses a token, at most; fewer where it has fewer distinct points. A `SenseBudget` is shared out so that
                the distortion of all embeddings is least, `MclConfig` is the paper's rule for decoders.
            metric: l2, dot or cosine.
            seed: of everything random.
            vocab_size: number V of tokens; default: the largest id + 1.
            max_occurrences: rows clustered a token at most, chosen at random; 0 = all.
            dtype: of the stored centroids.

        Returns:
            A dictionary without tokenizer and exemplars, its teacher called "in memory".

        Raises:
            BadInput: shapes, types or settings do not fit.
            MsenseError: an embedding is NaN or infinite.
        """
        ids, points = checked(token_ids, embeddings)
        rule = k if isinstance(k, SenseBudget | MclConfig) else None
        settings = KMeansConfig(k=1 if rule else whole_number(k), metric=metric, seed=seed)
        return cls(*cluster_in_memory(ids, points, settings, rule, vocab_size, max_occurrences, dtype))

    def merge(self, *others: "SenseDictionary") -> "SenseDictionary":
        """Return the union: each token's senses one after the other in the order of the arguments, occurrences added.

        Associative: a.merge(b).merge(c) and a.merge(b.merge(c)) are the same. Settings that may differ, and the
        tokenizer, are the first one's; quality figures are dropped. Everything is held in memory.

        Raises:
            DictionaryError: the dictionaries do not fit together, naming what differs, or a token gets too many senses.
        """
        every = (self, *others)
        config, arrays, centroids = unite([(d.config, d._arrays, d.ragged.floats()) for d in every])
        exemplars = unite_exemplars([(d._exemplar_table(), d.offsets) for d in every])
        return SenseDictionary(config, arrays, centroids, self._files, exemplars)

    @property
    def _arrays(self) -> Arrays:
        return Arrays(self.offsets, self.counts, self.spread, self.token_counts)

    @property
    def tokenizer_file(self) -> Path | None:
        """The teacher's tokenizer.json, if the dictionary's folder has one."""
        return self._optional("tokenizer")

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        path = self.tokenizer_file
        if path is None:
            raise BadInput(
                "this dictionary has no tokenizer to look words up with: use the token's id with senses(token)"
            )
        return read_vocabulary(path, self.vocab_size, self.config.tokenizer_fingerprint)

    def _optional(self, name: str) -> Path | None:
        """Return the path of a file that the dictionary's folder may have."""
        path = getattr(self._files, name) if self._files else None
        return self._files.inside(path) if self._files and path and os.path.lexists(path) else None

    def _exemplar_table(self, token: int | None = None) -> "pa.Table":
        import pyarrow.compute as pc

        if self._exemplars is None:
            known = token is None or 0 <= token < self.vocab_size
            here = self._files if known and self._optional("exemplars") else None
            return read_exemplars(here, self.offsets, token) if here else exemplar_schema().empty_table()
        return self._exemplars if token is None else self._exemplars.filter(pc.equal(self._exemplars["token"], token))

    def _checked(self, token_ids: np.ndarray | Tensor, embeddings: np.ndarray | Tensor) -> tuple[np.ndarray, Tensor]:
        """Return token ids as NumPy and embeddings as torch after a look at shapes, types and width."""
        ids, points = checked(token_ids, embeddings)
        if points.shape[1] != self.dim:
            raise BadInput(
                f"embeddings have width {points.shape[1]}, the dictionary {self.dim}: they are of another model"
            )
        return ids, points


def _chunks(senses: RaggedSenses) -> Iterator[Tensor]:
    """Cut centroids into chunks for the streaming writer."""
    width = senses.parts[0].shape[1] * 4
    yield from (
        senses.rows(index) for index in torch.arange(int(senses.offsets[-1])).split(max(1, _SAVE_BYTES // width))
    )
