"""Encode texts with a saved student: sentence vectors, and a sense for every token.

The interface follows sentence-transformers'. Memory: the student, the vectors twice, and the token ids and embeddings of a
batch of `_CHUNK` texts, or with replacement up to 16 · `_REPLACED` bytes of embeddings. The dictionary is memory-mapped on
first use. Never imports Ray.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from msense.constants import DEFAULT_TEMPERATURE, Replace
from msense.dictionary import SenseDictionary
from msense.errors import InputError, StudentError
from msense.io.extras import require
from msense.student.config import check_dictionary
from msense.student.files import checked_path, load_student, student_folder
from msense.student.hub import push
from msense.student.layout import StudentFiles
from msense.student.settings import read_settings
from msense.student.static import TokenTable
from msense.student.static_inference import StaticEncoder, split_by_size
from msense.student.streaming import check_positive, check_texts, chunks, map_in_order, progress_bar
from msense.student.student import Student
from msense.student.token_senses import TokenSense, kept_tokens, token_senses
from msense.student.tokenizer import StudentTokenizer, check_chunk, check_text, pad_ids
from msense.student.vectors import Precision, Vectors, check_precision, quantize, similarity, similarity_pairwise
from msense.teacher.batching import TOKEN_BUDGET, token_batches
from msense.teacher.body import resolve_dtype
from msense.text import first_line

if TYPE_CHECKING:
    from msense.explorer.render import Frame

_CHUNK = 1 << 14  # texts that are tokenized, sorted by length and computed together
_STATIC_TOKENS = 1 << 16  # tokens per step of a static student's progress bar
_REPLACED = 1 << 23  # numbers replaced at once: replacement is faster with more occurrences of each token
# names of prompts by kind of text; the first that exists counts, as in sentence-transformers
_PROMPT_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}
Dtype = Literal["auto", "float32", "bfloat16"]


class SenseEncoder:
    """A student (`config`) with its tokenizer and dictionary on a `device`; create it with `from_pretrained`.

    Attributes:
        prompts: prefixes of texts by name, as sentence-transformers stores them.
        default_prompt_name: the one of `encode`; None: no prompt.
        similarity_fn_name: cosine, dot, euclidean or manhattan.
        truncate_dim: numbers of every vector that are kept; None: all.

    Example:
        >>> encoder = SenseEncoder.from_pretrained("runs/student/student")  # doctest: +SKIP
        >>> encoder.encode(["a river bank", "a bank account"]).shape  # doctest: +SKIP
        (2, 384)
        >>> [(token.token, token.sense) for token in encoder.tokens("a river bank")]  # doctest: +SKIP
        [('a', 4), ('river', 0), ('bank', 2)]
    """

    def __init__(
        self, folder: Path, *, device: str | None = None, dtype: Dtype = "auto", truncate_dim: int | None = None
    ) -> None:
        """Load a local folder; see `from_pretrained`."""
        if dtype not in get_args(Dtype):
            raise InputError(f"invalid dtype {dtype!r}: use one of {get_args(Dtype)}")
        if truncate_dim is not None:
            check_positive("truncate_dim", truncate_dim)
        self._files = StudentFiles(folder)
        student = load_student(folder)
        self.config, self.truncate_dim = student.config, truncate_dim
        self._settings = read_settings(self._files, self.config)
        self.prompts = {name: prompt or "" for name, prompt in self._settings.prompts.items()}
        self.default_prompt_name = self._settings.default_prompt_name
        self.similarity_fn_name = self._settings.similarity_fn_name or "cosine"
        self._reader = StudentTokenizer(checked_path(self._files, self._files.tokenizer), self.config)
        static = isinstance(student.body, TokenTable)
        self.device = _device(device or ("cuda" if torch.cuda.is_available() and not static else "cpu"))
        auto = "float32" if self.device.type == "cpu" else resolve_dtype("auto", self.device.type)
        fast = static and self.device.type == "cpu"
        self._bfloat16 = not fast and (auto if dtype == "auto" else dtype) == "bfloat16"
        self._model = StaticEncoder(student) if fast else student.to(self.device)

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: Dtype = "auto",
        token: str | None = None,
        truncate_dim: int | None = None,
    ) -> "SenseEncoder":
        """Load a saved student.

        Args:
            name_or_dir: folder or URI of a student or of the run that made it, or a Hugging Face hub name.
            revision: branch, tag or commit on the hub.
            device: torch device; default: a GPU if available, but the CPU for a static student.
            dtype: in which a transformer computes; auto: float32 on a CPU, bfloat16 elsewhere. Vectors are float32, and
                so are all numbers of a static student on a CPU.
            token: for a private hub repository; default: the one stored on this machine.
            truncate_dim: numbers of every vector that are kept by default.

        Raises:
            StudentError: the student is unavailable, or a file is missing, truncated, malformed, inconsistent, or
                links out of the folder.
        """
        folder = student_folder(name_or_dir, revision, token)
        return cls(folder, device=device, dtype=dtype, truncate_dim=truncate_dim)

    @cached_property
    def dictionary(self) -> SenseDictionary:
        """The student's dictionary, on its device; StudentError if there is none, or that of another student."""
        folder = self._files.dictionary
        if self.config.is_table:
            raise StudentError("a table knows no senses: distill a student of another kind, such as static")
        if not folder.is_dir():
            raise StudentError(
                f"student {self._files.folder} has no dictionary, only sentence vectors: save it again with "
                "senses='float16' or 'int8'"
            )
        dictionary = SenseDictionary.load(folder)
        check_dictionary(self.config, dictionary.config)
        return dictionary if self.device.type == "cpu" else dictionary.to(self.device)

    def encode(  # noqa: PLR0913 - the arguments of sentence-transformers' encode, and two more
        self,
        texts: str | Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        precision: Precision = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        replace: Replace | None = None,
        temperature: float = DEFAULT_TEMPERATURE,
    ) -> np.ndarray | Tensor | list[Tensor]:
        """Return sentence vectors, float32 [n, D'], or [D'] for a single text; D' is `get_sentence_embedding_dimension()`.

        Args:
            texts: one text or n, each truncated to `config.max_length` tokens; an iterator is read in chunks.
            prompt_name: of `prompts`; default: `default_prompt_name`.
            prompt: prefix of each text, in place of a named one.
            batch_size: maximum texts per batch of a transformer; long texts make smaller batches.
            show_progress_bar: on stderr; default: no.
            precision: of the vectors; see `vectors.quantize`.
            convert_to_numpy: if false, return a list of tensors [D'].
            convert_to_tensor: return one tensor on the encoder's device; overrides `convert_to_numpy`.
            normalize_embeddings: scale every vector to unit length.
            truncate_dim: numbers of every vector that are kept; default: the encoder's.
            replace: before pooling, replace each token embedding by its nearest sense ("hard") or a softmax-weighted
                mean of its token's senses ("soft"); tokens without senses are unchanged.
            temperature: of soft replacement, in units of the dictionary's mean squared distance.

        Raises:
            InputError: a text or an argument is invalid.
            StudentError: `replace` is set and the student has no dictionary.
        """
        check_precision(precision)
        if replace not in (None, "hard", "soft"):
            raise InputError(f"invalid replace {replace!r}: use None, 'hard' or 'soft'")
        if replace is not None:
            _ = self.dictionary  # raises if there is none, also without texts
        check_positive("batch_size", batch_size)
        width = self._width(truncate_dim)
        single = isinstance(texts, str)
        every = [texts] if isinstance(texts, str) else texts
        check_texts(every)
        prompt = self._prompt(prompt, prompt_name)
        vectors = [torch.empty(0, width, dtype=torch.float32, device=self.device)]
        with torch.no_grad(), self._autocast(), progress_bar(every, shown=show_progress_bar) as advance:
            for number, chunk in enumerate(chunks(every, _CHUNK)):
                check_chunk(chunk, number * _CHUNK)
                found = self._vectors(chunk, prompt, batch_size, replace, temperature, advance)[:, :width]
                vectors.append(torch.nn.functional.normalize(found, dim=1) if normalize_embeddings else found)
        result = torch.cat(vectors[1:] or vectors)
        if precision != "float32":
            result = torch.from_numpy(quantize(result.cpu().numpy(), precision)).to(self.device)
        result = result[0] if single else result
        if convert_to_tensor or (single and not convert_to_numpy):
            return result
        return result.cpu().numpy() if convert_to_numpy else list(result)

    def encode_query(self, texts: str | Iterable[str], **options: Any) -> np.ndarray | Tensor | list[Tensor]:
        """Return the vectors of queries as `encode` does, by default with the prompt named "query" if there is one."""
        return self.encode(texts, **self._named("query", options))

    def encode_document(self, texts: str | Iterable[str], **options: Any) -> np.ndarray | Tensor | list[Tensor]:
        """Return the vectors of documents as `encode` does, by default with the prompt "document" if there is one."""
        return self.encode(texts, **self._named("document", options))

    def encode_many(
        self,
        texts: Iterable[str],
        *,
        chunk_size: int = _CHUNK,
        num_workers: int = 1,
        show_progress_bar: bool | None = None,
        **options: Any,
    ) -> Iterator[np.ndarray]:
        """Yield the vectors of any number of texts in their order, in bounded memory.

        Args:
            texts: any iterable, such as a generator; at most `num_workers` + 1 chunks of it are held.
            chunk_size: texts per yielded array.
            num_workers: threads that encode chunks; with several, set torch's own to one (`torch.set_num_threads`).
            show_progress_bar: on stderr, with a total if `texts` has a length; default: no.
            **options: of `encode`, but none of those that choose its type; int8 and uint8, whose ranges are those of all
                vectors, are refused.

        Yields:
            float32 [m, D'] (or another precision) of up to `chunk_size` texts.

        Raises:
            InputError: a text or an argument is invalid.
        """
        check_texts(texts)
        check_positive("chunk_size", chunk_size)
        check_positive("num_workers", num_workers)
        if options.get("precision") in ("int8", "uint8"):
            raise InputError("the ranges of int8 and uint8 are those of all vectors: use encode, or quantize later")
        if unknown := options.keys() & {"convert_to_numpy", "convert_to_tensor"}:
            raise InputError(f"encode_many yields arrays, and has no {unknown.pop()}: use encode")
        self.encode([], **options)  # raises for invalid options now, not when the first vectors are read

        def encoded() -> Iterator[np.ndarray]:
            def encode(numbered: tuple[int, list[str]]) -> np.ndarray:
                number, chunk = numbered
                check_chunk(chunk, number * chunk_size)
                return np.asarray(self.encode(chunk, **options))

            with progress_bar(texts, shown=show_progress_bar) as advance:
                for vectors in map_in_order(encode, enumerate(chunks(texts, chunk_size)), num_workers):
                    advance(len(vectors))
                    yield vectors

        return encoded()

    def similarity(self, a: Vectors, b: Vectors) -> Tensor:
        """Return the similarities, float32 [n, m], of vectors [n, D] and [m, D], by `similarity_fn_name`."""
        return similarity(a, b, self.similarity_fn_name)

    def similarity_pairwise(self, a: Vectors, b: Vectors) -> Tensor:
        """Return the similarity, float32 [n], of each vector of a, [n, D], with that of b, by `similarity_fn_name`."""
        return similarity_pairwise(a, b, self.similarity_fn_name)

    def get_sentence_embedding_dimension(self) -> int:
        """Return the size D' of the vectors."""
        return self._width(None)

    get_embedding_dimension = get_sentence_embedding_dimension  # its name since sentence-transformers 5.4

    @property
    def max_seq_length(self) -> float:
        """Maximum tokens of a text, special tokens included, after which it is cut; infinite for a table."""
        return math.inf if self.config.is_table else self.config.max_length

    def tokens(self, text: str, *, prompt: str | None = None) -> list[TokenSense]:
        """Return the tokens of a text, truncated to `config.max_length`, without special tokens and those of the prompt.

        Raises:
            InputError: the text is invalid.
            StudentError: the student has no dictionary.
            DictionaryError: the dictionary is damaged.
        """
        dictionary, prompt = self.dictionary, self._prompt(prompt, None)
        encoding = self._reader.encoding(text, prompt)
        with torch.no_grad(), self._autocast():
            embeddings = self._senses([np.array(encoding.ids, np.int64)])
        kept = kept_tokens(encoding, prompt)
        return token_senses(dictionary, encoding, kept, embeddings[kept], prompt)

    def explain(self, text: str) -> "Frame":
        """Return a text with the senses of its tokens for a notebook, in a frame that loads and runs nothing.

        Raises:
            InputError: the extra `explore` is missing, or the text is invalid.
            StudentError, DictionaryError: as `tokens`.
        """
        require("explore", "SenseEncoder.explain", ("jinja2", "scipy"))
        from msense.explorer.render import explain

        return explain(self, text)

    def save_onnx(self, path: str | Path) -> None:
        """Write the student as ONNX; see `onnx_export.save_onnx`. "onnx/model.onnx" in its folder is its usual place.

        Raises:
            StudentError: the student reads padding, or torch cannot export it.
        """
        from msense.student.onnx_export import save_onnx

        save_onnx(load_student(self._files.folder), Path(path))

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, exemplars: bool = False, token: str | None = None
    ) -> str:
        """Upload the student's files to the hub, creating the repository if needed; return the URL of the commit.

        The dictionary's exemplars, which quote the corpus, are left out by default.

        Raises:
            StudentError: a file links outside the folder.
            MsenseError: the name is invalid, or the hub is unavailable or refuses.
        """
        return push(self._files, repo_id, private=private, exemplars=exemplars, token=token)

    def _prompt(self, given: str | None, name: str | None) -> str:
        """Return a given prompt, or that of a name, or the default one; InputError for an unknown name."""
        name = self.default_prompt_name if name is None else name
        if given is not None:
            check_text("the prompt", given)
            return given
        if name is None:
            return ""
        if isinstance(name, str) and name in _PROMPT_NAMES and name not in self.prompts:
            return ""  # as sentence-transformers, which knows these of every model
        if not isinstance(name, str) or name not in self.prompts:
            raise InputError(f"no prompt {name!r}: use one of {tuple(self.prompts)}, or give `prompt` itself")
        return self.prompts[name]

    def _named(self, kind: str, options: dict[str, Any]) -> dict[str, Any]:
        """Return options with the name of the prompt for a kind of texts, unless they have one."""
        if options.get("prompt") is not None or options.get("prompt_name") is not None:
            return options
        return {**options, "prompt_name": next((name for name in _PROMPT_NAMES[kind] if name in self.prompts), None)}

    def _width(self, truncate_dim: int | None) -> int:
        """Return the size of the vectors; InputError if it is invalid."""
        given = self.truncate_dim if truncate_dim is None else truncate_dim
        if given is None:
            return self.config.sentence_dim
        check_positive("truncate_dim", given)
        return min(given, self.config.sentence_dim)

    def _vectors(
        self,
        texts: list[str],
        prompt: str,
        batch_size: int,
        replace: Replace | None,
        temperature: float,
        advance: Callable[[int], None],
    ) -> Tensor:
        """Return the sentence vectors of a chunk, float32 [n, D']; report finished texts."""
        rows = self._reader.ids(texts, prompt)
        skip = self.config.skipped(self._reader.tokenizer, prompt)
        vectors = torch.empty(len(rows), self.config.sentence_dim, dtype=torch.float32, device=self.device)
        for group in self._groups(rows, batch_size, replaced=replace is not None):
            batches = [[rows[i] for i in batch] for batch in group]
            if replace is None:
                pooled = torch.cat([self._pooled(batch, skip) for batch in batches])
            else:
                pooled = self._replaced(batches, skip, temperature if replace == "soft" else None)
            places = np.concatenate(group)
            vectors[torch.from_numpy(places).to(self.device)] = pooled
            advance(len(places))
        return vectors

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16)

    def _groups(self, rows: list[np.ndarray], batch_size: int, *, replaced: bool) -> list[list[np.ndarray]]:
        """Return groups of batches of indices, int64 [B]; the tokens of a group are replaced at once.

        Batches are in order for a static student, else by length to reduce padding.
        """
        lengths = np.array([len(row) for row in rows], np.int64)
        limit = max(1, _REPLACED // self.config.dim)
        if isinstance(self._model, StaticEncoder):
            return [[batch] for batch in split_by_size(lengths, limit if replaced else _STATIC_TOKENS)]
        budget = TOKEN_BUDGET.get(self.device.type, TOKEN_BUDGET["cuda"])
        batches = [
            batch
            for similar in token_batches(lengths, budget)
            for batch in np.split(similar, range(batch_size, len(similar), batch_size))
        ]
        sizes = np.array([lengths[batch].sum() for batch in batches], np.int64)
        return [[batches[i] for i in group] for group in split_by_size(sizes, limit if replaced else 1)]

    def _pooled(self, rows: list[np.ndarray], skip: int) -> Tensor:
        """Return the sentence vectors of a batch, float32 [B, D']."""
        if isinstance(self._model, StaticEncoder):
            return torch.from_numpy(self._model.sentences(rows, skip))
        hidden, _, mask = self._forward(self._model, rows)
        return self._model.sentence(hidden, mask, skip)

    def _replaced(self, batches: list[list[np.ndarray]], skip: int, temperature: float | None) -> Tensor:
        """Return the vectors of several batches, float32 [B, D'], pooled from replaced embeddings."""
        rows = [row for batch in batches for row in batch]
        embeddings = torch.cat([self._senses(batch) for batch in batches])
        with torch.autocast(self.device.type, enabled=False):
            embeddings = self.dictionary.replace(torch.from_numpy(np.concatenate(rows)), embeddings, temperature)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            vectors: Tensor = self._model.sentence_head.of_rows(embeddings, lengths, skip)
        return vectors

    def _senses(self, rows: list[np.ndarray]) -> Tensor:
        """Return the sense embeddings of all tokens of some texts, float32 [N, D]."""
        if isinstance(self._model, StaticEncoder):
            return torch.from_numpy(self._model.sense_embeddings(rows))
        _, senses, mask = self._forward(self._model, rows)
        return senses[mask]

    def _forward(self, model: Student, rows: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states and sense embeddings, float32 [B, L, D] each, and the mask [B, L]."""
        ids, mask = (tensor.to(self.device) for tensor in pad_ids(rows))
        output = model(ids, mask)
        return output.hidden.float(), output.senses.float(), mask


def _device(name: str) -> torch.device:
    """Return a device on which torch can compute here; raise InputError for another."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise InputError(f"device {name!r} is not available ({first_line(error)}): use cpu") from error
    if device.type == "meta":
        raise InputError("device 'meta' holds no numbers: use cpu")
    return device
