"""The sense dictionary: centroids of the contextual embeddings of every token in a vocabulary.

A loaded dictionary memory-maps its centroids and holds the small arrays (20 bytes per sense, 16 per token);
`from_embeddings` and `merge` hold everything in memory.
"""

import os
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from msense.clustering.budget import DEFAULT_BUDGET, SenseBudget
from msense.clustering.kmeans import KMeansConfig
from msense.clustering.mcl import MclConfig
from msense.constants import Metric
from msense.dictionary import assignment
from msense.dictionary.assignment import RaggedSenses
from msense.dictionary.checks import validate_inputs
from msense.dictionary.contexts import Exemplar, exemplar_schema, read_exemplars, write_exemplars
from msense.dictionary.format import open_dictionary, write_dictionary
from msense.dictionary.layout import Arrays, DictionaryConfig, DictionaryFiles, Stored
from msense.dictionary.lookup import Match, Vocabulary
from msense.dictionary.making import cluster_in_memory, merge_contents, merge_exemplars
from msense.dictionary.neighbours import Neighbour, NeighbourIndex, Progress
from msense.errors import DictionaryError, InputError
from msense.io.extras import require
from msense.io.scratch import atomic_path, copy_file
from msense.io.storage import user_cache

if TYPE_CHECKING:
    import pyarrow as pa

    from msense.explorer.render import Frame

ArrayT = TypeVar("ArrayT", np.ndarray, Tensor)
_SAVE_BYTES = 64 << 20
_INSIDE = (  # where a portable student, another student or a run, and the output of `msense make` have it
    *("senses/dictionary", "dictionary", "dictionary/dictionary"),
)
_SMALLEST, _LARGEST = 1e-37, 1e38  # range of float32 divisors


class Senses(NamedTuple):
    """The K senses of one token."""

    centroids: Tensor  # float32 [K, D]
    counts: np.ndarray  # int64 [K], points clustered into each
    rms_distance: np.ndarray  # float32 [K], RMS distance of these points


class SenseDictionary:
    """The senses of a teacher's vocabulary, created by `load`, `from_embeddings` or `merge`; its length is their number S.

    Attributes:
        config: settings and provenance.
        dim: width D of embeddings and senses.
        vocab_size: number V of tokens, with and without senses.
        ragged: the senses in the form required by `msense.dictionary.assignment`.
        offsets, counts, rms_distance, token_counts: see `Arrays`.

    Example:
        >>> dictionary = SenseDictionary.from_embeddings(token_ids, embeddings, k=8)
        >>> dictionary.assign(token_ids, embeddings)  # [N], [N, D] -> sense numbers [N]
        >>> dictionary.save("senses")
        >>> SenseDictionary.load("senses").replace(token_ids, embeddings)  # [N, D]
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
        """Create a dictionary from validated contents: `centroids` [S_i, D] and, if int8, `scales` float32 [S].

        `files` is the folder of the tokenizer and, unless given as a table, of the exemplars.
        """
        self.config = config
        self.dim, self.vocab_size = config.dim, config.vocab_size
        self._arrays = arrays
        self.offsets, self.counts, self.rms_distance, self.token_counts = arrays
        self.ragged = RaggedSenses(self.offsets, centroids, scales)
        self._files = files
        self._exemplars = exemplars
        self._neighbour_index: NeighbourIndex | None = None

    def __len__(self) -> int:
        return len(self.counts)

    def __repr__(self) -> str:
        c = self.config
        of = f"{c.vocab_size:,} tokens, dim {c.dim}, {c.dtype}, {c.metric}, teacher {c.teacher.name!r}"
        return f"SenseDictionary({len(self):,} senses of {of})"

    @property
    def centroids(self) -> Tensor:
        """All senses [S, D] in the stored dtype; copied to memory if split into files, and to float32 if int8."""
        parts = self.ragged.floats()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @classmethod
    def load(cls, source: str | Path) -> "SenseDictionary":
        """Load a dictionary from the folder or URI of a dictionary, run or student; a URI's files are cached.

        Raises:
            DictionaryError: a file is missing, truncated, foreign, links out of the folder or contradicts another.
                Centroids are checked for finite values only when used.
        """
        if "://" in str(source):
            from msense.io import storage

            inside = (storage.join(str(source), name) for name in _INSIDE)
            source = next((uri for uri in inside if storage.exists(storage.join(uri, "config.json"))), str(source))
            source = storage.local_copy(source)
        folder = Path(source)
        inner = (folder / name for name in _INSIDE)  # a student's stands beside the config of its model
        folder = next((own for own in inner if os.path.lexists(DictionaryFiles(own).config)), folder)
        try:
            config, arrays, centroids, scales = open_dictionary(folder)
        except OSError as error:
            raise DictionaryError(f"cannot read {folder}: {error}; check its permissions, or copy it again") from error
        return cls(config, arrays, centroids, DictionaryFiles(folder), scales=scales)

    def save(self, folder: str | Path, dtype: Stored | None = None) -> None:
        """Write the dictionary with tokenizer, exemplars and model card to a local folder; an existing one is replaced.

        int8 takes D + 4 bytes per sense, with an error of at most 1/254 of the largest absolute value of each sense.

        Raises:
            InputError: the folder is a URI, or the dtype is unknown.
            DictionaryError: the arrays contradict each other, or a centroid overflows the dtype.
        """
        if dtype not in (None, *get_args(Stored)):
            raise InputError(f"dtype is {dtype!r}, but must be one of {get_args(Stored)}")
        if "://" in str(folder):
            raise InputError(f"{folder} is not a local folder: save to one, then upload it")
        files = DictionaryFiles(Path(folder))
        files.folder.mkdir(parents=True, exist_ok=True)
        files.config.unlink(missing_ok=True)
        if self._exemplars is not None:
            with atomic_path(files.exemplars) as scratch:
                write_exemplars(self._exemplars, scratch)
        else:
            copy_file(self._optional("exemplars"), files.exemplars)
        target = files.tokenizer.resolve()
        if not target.is_relative_to(files.folder.resolve()):
            raise DictionaryError(f"{files.tokenizer} links to {target}, outside the folder: remove that link")
        copy_file(self._optional("tokenizer"), files.tokenizer)
        config = self.config.model_copy(update={"dtype": dtype or self.config.dtype})
        rows = torch.arange(len(self)).split(max(1, _SAVE_BYTES // (self.dim * 4)))
        write_dictionary(files.folder, config, *self._arrays, map(self.ragged.rows, rows))

    def to(self, device: str | torch.device) -> "SenseDictionary":
        """Return a dictionary whose centroids are on a device (2·S·D bytes there for float16)."""
        scales = None if self.ragged.scales is None else self.ragged.scales.to(device)
        parts = tuple(part.to(device) for part in self.ragged.parts)
        return SenseDictionary(self.config, self._arrays, parts, self._files, self._exemplars, scales)

    def senses(self, token: int) -> Senses:
        """Return the senses of a token; raise InputError for an unknown token, DictionaryError if one is not finite."""
        if not 0 <= token < self.vocab_size:
            raise InputError(f"token {token} is not in the vocabulary: the token ids are 0 to {self.vocab_size - 1}")
        start, end = self.offsets[token : token + 2].tolist()
        centroids = self.ragged.rows(torch.arange(start, end)).float()
        if not torch.isfinite(centroids).all():
            raise DictionaryError(f"a sense of token {token} is NaN or infinite: build the dictionary again")
        return Senses(centroids, self.counts[start:end], self.rms_distance[start:end])

    def lookup(self, word: str) -> Match:
        """Look up the tokens of a word in the tokenizer's variants of it (`bank`, `Ġbank`, `▁bank`, `Bank`).

        Raises:
            InputError: the dictionary has no tokenizer.
            DictionaryError: its tokenizer.json is corrupted or that of another tokenizer.
        """
        return self._vocabulary.lookup(word, np.diff(self.offsets))

    def pieces(self, word: str) -> list[int]:
        """Return the token ids of a word of one or several tokens; none if any is unknown; errors as `lookup`."""
        return self._vocabulary.pieces(word)

    @cached_property
    def token_texts(self) -> list[str]:
        """The text of each token id [V], as it stands in a text, without spaces around it; errors as `lookup`."""
        return self._vocabulary.texts(self.vocab_size)

    def exemplars(self, token: int) -> list[Exemplar]:
        """Return the contexts of a token's senses by sense and rank; raise DictionaryError if the file is corrupted."""
        rows = (Exemplar(*(row[name] for name in Exemplar._fields)) for row in self._exemplar_table(token).to_pylist())
        return sorted(rows, key=lambda exemplar: exemplar[:2])

    def neighbours(self, token: int, sense: int, top: int = 10) -> list[Neighbour]:
        """Return the `top` senses of other tokens that are nearest to a sense, nearest first.

        The first call makes an index of a large dictionary (20 s for a million senses of width 384 on one core) and keeps it
        in the user's cache; see `msense.dictionary.neighbours`.

        Raises:
            InputError: there is no such token or sense, or `top` is not positive.
            DictionaryError: the sense is NaN or infinite.
        """
        self.prepare_neighbours()
        assert self._neighbour_index is not None
        return self._neighbour_index.nearest(token, sense, top)

    def prepare_neighbours(self, progress: Progress | None = None) -> None:
        """Make or load what `neighbours` needs, which its first call does otherwise; report the finished part, 0 to 1."""
        if self._neighbour_index is not None:
            return
        if self._files is None:
            self._neighbour_index = NeighbourIndex.of(self.ragged, progress=progress)
        else:
            folder = user_cache() / "neighbours"
            self._neighbour_index = NeighbourIndex.cached(self.ragged, self._files.fingerprint, folder, progress)

    def plot(self, word: str, *, level: float = 0.3) -> "Frame":
        """Return the senses of a word for a notebook, in a frame that loads and runs nothing (extra `explore`).

        Args:
            word: of one token or several.
            level: near-identical senses are folded up to this share, 0 to 1; 0: none.

        Raises:
            InputError: the extra is missing, the dictionary has no tokenizer, or the level is invalid.
            DictionaryError: it is damaged.
        """
        require("explore", "SenseDictionary.plot", ("jinja2", "scipy"))
        from msense.explorer.render import plot

        return plot(self, word, level=level)

    def assign(self, token_ids: ArrayT, embeddings: ArrayT, *, metric: Metric | None = None) -> ArrayT:
        """Return the index int64 [N] of the nearest sense of each token id [N] to its embedding [N, D].

        Ties go to the lowest index; it is -1 for tokens without senses or outside the vocabulary.

        Raises:
            InputError: a shape or dtype is invalid, or an embedding is NaN or infinite.
        """
        ids, points = validate_inputs(token_ids, embeddings, self.dim)
        nearest = assignment.assign(ids, points, self.ragged, self._metric(metric))
        return nearest if isinstance(embeddings, Tensor) else nearest.numpy()

    def replace(
        self, token_ids: ArrayT, embeddings: ArrayT, temperature: float | None = None, *, metric: Metric | None = None
    ) -> ArrayT:
        """Return embeddings replaced by senses of their own token; those of tokens without senses are unchanged.

        Args:
            token_ids: integers [N].
            embeddings: floating point [N, D].
            temperature: None for the nearest sense; otherwise the mean of the token's senses, weighted by
                softmax(scores / (temperature · unit)). Scores are minus the squared distance, the dot product or the
                cosine; the unit is the dictionary's mean squared distance for all three metrics.
            metric: l2, dot or cosine; None = the dictionary's.

        Raises:
            InputError: a shape, a dtype or the temperature is invalid, or an embedding is NaN or infinite.
        """
        ids, points = validate_inputs(token_ids, embeddings, self.dim)
        scale = None if temperature is None else self._scale(temperature)
        replaced = assignment.replace(ids, points, self.ragged, self._metric(metric), scale or None)
        return replaced if isinstance(embeddings, Tensor) else replaced.numpy()

    def top_k(
        self, token_ids: Tensor, embeddings: Tensor, top: int, temperature: float, *, metric: Metric | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the `top` nearest senses of each embedding and their weights, as `assignment.top_k`."""
        ids, points = validate_inputs(token_ids, embeddings, self.dim)
        scale = max(self._scale(temperature), _SMALLEST)
        return assignment.top_k(ids, points, self.ragged, self._metric(metric), scale, top)

    def _metric(self, given: Metric | None) -> Metric:
        metric = self.config.metric if given is None else given
        if metric not in get_args(Metric):
            raise InputError(f"metric is {metric!r}, but must be one of {', '.join(get_args(Metric))}")
        return metric

    def _scale(self, temperature: float) -> float:
        """Return the divisor of scores; 0 selects the nearest sense, also where each sense is a single point."""
        if not isinstance(temperature, Real) or not 0 < temperature < float("inf"):
            raise InputError(f"temperature is {temperature!r}, but must be finite and positive, or None: nearest sense")
        scale = temperature * self.config.temperature_unit
        return min(scale, _LARGEST) if scale > _SMALLEST else 0.0  # beyond float32 the weights would be NaN

    @property
    def fingerprint(self) -> str:
        """The hexadecimal SHA-256 of config and arrays of a loaded dictionary; reads its files."""
        if self._files is None:
            raise InputError("an in-memory dictionary has no fingerprint: save and load it first")
        return self._files.fingerprint()

    @classmethod
    def from_embeddings(
        cls,
        token_ids: np.ndarray | Tensor,
        embeddings: np.ndarray | Tensor,
        *,
        k: int | SenseBudget | MclConfig = DEFAULT_BUDGET,
        metric: Metric = "l2",
        seed: int = 0,
        vocab_size: int | None = None,
        dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    ) -> "SenseDictionary":
        """Cluster embeddings in memory; the result has no tokenizer and no exemplars.

        Args:
            token_ids: integers [N], in any order.
            embeddings: floating point [N, D].
            k: maximum senses per token, limited by its distinct points; a `SenseBudget`, allocated to minimize the
                distortion of all embeddings; or `MclConfig`, the paper's method for decoders.
            metric: l2, dot or cosine.
            seed: seed of all random choices.
            vocab_size: number of tokens V; None = largest id + 1.
            dtype: of the stored centroids.

        Raises:
            InputError: a shape, dtype or setting is invalid.
            MsenseError: an embedding is NaN or infinite.
        """
        ids, points = validate_inputs(token_ids, embeddings)
        rule, number = (k, 1) if isinstance(k, SenseBudget | MclConfig) else (None, k)
        if not isinstance(number, int | np.integer):
            raise InputError(f"k is {k!r}, but must be an integer, a SenseBudget or an MclConfig")
        settings = KMeansConfig(k=int(number), metric=metric, seed=seed)
        return cls(*cluster_in_memory(ids, points, settings, rule, vocab_size, dtype))

    fit = from_embeddings  # former name

    def merge(self, *others: "SenseDictionary") -> "SenseDictionary":
        """Return the union in memory: each token's senses in the order of the arguments, occurrences added.

        Associative. The tokenizer and other settings are those of the first dictionary; quality figures are dropped.

        Raises:
            DictionaryError: the dictionaries are incompatible, or a token has too many senses.
        """
        every = (self, *others)
        config, arrays, centroids = merge_contents([(d.config, d._arrays, d.ragged.floats()) for d in every])
        exemplars = merge_exemplars([(d._exemplar_table(), d.offsets) for d in every])
        return SenseDictionary(config, arrays, centroids, self._files, exemplars)

    @property
    def tokenizer_file(self) -> Path | None:
        """The teacher's tokenizer.json, if the folder has one."""
        return self._optional("tokenizer")

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        path = self.tokenizer_file
        if path is None:
            raise InputError("this dictionary has no tokenizer to look up words: use senses(token) with a token id")
        return Vocabulary(path, self.vocab_size, self.config.tokenizer_fingerprint)

    def _optional(self, name: str) -> Path | None:
        """Return the validated path of an optional file, or None if absent."""
        path = getattr(self._files, name) if self._files else None
        return self._files.inside(path) if self._files and path and os.path.lexists(path) else None

    def _exemplar_table(self, token: int | None = None) -> "pa.Table":
        import pyarrow.compute as pc

        if self._exemplars is None:
            known = token is None or 0 <= token < self.vocab_size
            files = self._files if known and self._optional("exemplars") else None
            return read_exemplars(files, self.offsets, token) if files else exemplar_schema().empty_table()
        return self._exemplars if token is None else self._exemplars.filter(pc.equal(self._exemplars["token"], token))
