"""Encode texts with a saved student: sentence vectors, and a sense for every token.

The interface follows sentence-transformers' `encode`. Memory: the student, all token ids and vectors, and the
embeddings of one batch, or with replacement up to 16 · `_REPLACED` bytes of them. The dictionary is memory-mapped on
first use. Never imports Ray.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from msense.dictionary import SenseDictionary
from msense.dictionary.contexts import Exemplar
from msense.errors import InputError, StudentError
from msense.io.atomic import copy_file
from msense.student.config import StudentConfig, StudentFiles
from msense.student.files import checked_path, load_student
from msense.student.hub import push_student, student_folder
from msense.student.shipping import check_dictionary
from msense.student.static import StaticBody
from msense.student.static_inference import StaticEncoder
from msense.student.student import Student
from msense.student.tokenizer import StudentTokenizer, pad_ids
from msense.teacher.batching import TOKEN_BUDGET, token_batches
from msense.teacher.body import resolve_dtype
from msense.teacher.pooling import pool, pool_rows
from msense.text import clean

DEFAULT_TEMPERATURE = 1 / 3  # in units of the dictionary's mean squared distance
_STATIC_TOKENS = 1 << 16  # tokens per step of a static student's progress bar
_REPLACED = 1 << 23  # numbers replaced at once: replacement is faster with more occurrences of each token
Replace = Literal["hard", "soft"]
Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TokenSense:
    """A token of a text and its sense."""

    token: str  # as written in the vocabulary
    token_id: int
    start: int  # offset in the text, in characters
    end: int  # exclusive
    sense: int  # index of its nearest sense; -1 for a token without senses
    probability: float  # softmax(score / (temperature · unit)) among the token's senses; 0 without senses
    exemplar: str | None  # nearest corpus context of that sense, the token in brackets, if the dictionary has one


class SenseEncoder:
    """A student (`config`) with its tokenizer and dictionary on a `device`; create it with `from_pretrained`.

    Example:
        >>> encoder = SenseEncoder.from_pretrained("runs/student/student")  # doctest: +SKIP
        >>> encoder.encode(["a river bank", "a bank account"]).shape  # doctest: +SKIP
        (2, 384)
        >>> [(token.token, token.sense) for token in encoder.tokens("a river bank")]  # doctest: +SKIP
        [('a', 4), ('river', 0), ('bank', 2)]
    """

    def __init__(self, folder: Path, *, device: str | None = None, dtype: Dtype = "auto") -> None:
        """Load a local folder; see `from_pretrained`."""
        if dtype not in get_args(Dtype):
            raise InputError(f"invalid dtype {dtype!r}: use one of {get_args(Dtype)}")
        self._files = StudentFiles(folder)
        student = load_student(folder)
        self.config: StudentConfig = student.config
        self._reader = StudentTokenizer(checked_path(self._files, self._files.tokenizer), self.config)
        static = isinstance(student.body, StaticBody)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() and not static else "cpu"))
        self._model: Student | StaticEncoder
        if static and self.device.type == "cpu":
            self._bfloat16 = False  # the dtype applies to the tables only
            self._model = StaticEncoder(student, "float32" if dtype == "auto" else dtype)
        else:
            self._bfloat16 = _uses_bfloat16(dtype, self.device)
            self._model = student.to(self.device)

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: Dtype = "auto",
        token: str | None = None,
    ) -> "SenseEncoder":
        """Load a saved student.

        Args:
            name_or_dir: folder, URI or Hugging Face hub name.
            revision: branch, tag or commit on the hub.
            device: torch device; default: a GPU if available, but the CPU for a static student.
            dtype: in which a transformer computes; auto: float32 on a CPU, bfloat16 elsewhere. Vectors are float32.
            token: for a private hub repository; default: the one stored on this machine.

        Raises:
            StudentError: the student is unavailable, or a file is missing, truncated, malformed, inconsistent, or
                links out of the folder.
            InputError: the device does not support the dtype.
        """
        return cls(student_folder(name_or_dir, revision, token), device=device, dtype=dtype)

    @cached_property
    def dictionary(self) -> SenseDictionary:
        """The student's dictionary, on its device.

        Raises:
            StudentError: the folder has no dictionary, or that of another student.
            DictionaryError: the dictionary is damaged.
        """
        folder = self._files.dictionary
        if not folder.is_dir():
            raise StudentError(
                f"student {self._files.folder} has no dictionary, only sentence vectors: save it again with "
                "senses='float16' or 'int8'"
            )
        dictionary = SenseDictionary.load(folder)
        check_dictionary(self.config, dictionary)
        return dictionary if self.device.type == "cpu" else dictionary.to(self.device)

    def encode(  # noqa: PLR0913 - the arguments of sentence-transformers' encode, and two more
        self,
        texts: str | Sequence[str],
        *,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
        replace: Replace | None = None,
        temperature: float = DEFAULT_TEMPERATURE,
    ) -> np.ndarray | Tensor | list[Tensor]:
        """Return sentence vectors, float32 [n, D], or [D] for a single text.

        Args:
            texts: one text or n; each is truncated to `config.max_length` tokens.
            prompt: prefix of each text; default: the one used in training.
            batch_size: maximum texts per batch of a transformer; long texts make smaller batches.
            show_progress_bar: on stderr; default: no.
            convert_to_numpy: if false, return a list of tensors [D].
            convert_to_tensor: return one tensor on the encoder's device; overrides `convert_to_numpy`.
            normalize_embeddings: scale every vector to unit length.
            replace: before pooling, replace each token embedding by its nearest sense ("hard") or a softmax-weighted
                mean of its token's senses ("soft"); tokens without senses are unchanged.
            temperature: of soft replacement, in units of the dictionary's mean squared distance.

        Raises:
            InputError: a text or an argument is invalid.
            StudentError: `replace` is set and the student has no dictionary.
        """
        if replace not in (None, "hard", "soft"):
            raise InputError(f"invalid replace {replace!r}: use None, 'hard' or 'soft'")
        if batch_size < 1:
            raise InputError(f"invalid batch_size {batch_size}: use 1 or more")
        rows = self._reader.ids(
            [texts] if isinstance(texts, str) else texts, self.config.prompt if prompt is None else prompt
        )
        soft = temperature if replace == "soft" else None
        vectors = torch.empty(len(rows), self.config.dim, device=self.device)
        bar = _progress_bar(len(rows)) if show_progress_bar else None
        with torch.no_grad(), self._autocast(), bar or nullcontext():
            batches = self._batches(rows, batch_size, plain=replace is None)
            steps = self._plain(rows, batches) if replace is None else self._replaced(rows, batches, soft)
            for places, batch in steps:
                vectors[torch.from_numpy(places).to(self.device)] = batch
                if bar is not None:
                    bar.update(bar.task_ids[0], advance=len(places))
            if normalize_embeddings:
                vectors = torch.nn.functional.normalize(vectors, dim=1)
        result = vectors[0] if isinstance(texts, str) else vectors
        if convert_to_tensor or (isinstance(texts, str) and not convert_to_numpy):
            return result
        return result.cpu().numpy() if convert_to_numpy else list(result)

    def tokens(self, text: str, *, prompt: str | None = None, exemplars: bool = True) -> list[TokenSense]:
        """Return the tokens of a text with their senses, without special tokens and those of the prompt.

        The text is truncated to `config.max_length` tokens; `exemplars=False` skips the examples of the senses.

        Raises:
            InputError: the text is invalid.
            StudentError: the student has no dictionary.
            DictionaryError: the dictionary is damaged.
        """
        dictionary = self.dictionary
        prompt = self.config.prompt if prompt is None else prompt
        encoding = self._reader.encoding(text, prompt)
        every = np.array(encoding.ids, np.int64)
        with torch.no_grad(), self._autocast():
            embeddings = self._senses([every])
        places = zip(encoding.special_tokens_mask, encoding.offsets, strict=True)
        kept = [i for i, (special, (a, b)) in enumerate(places) if not special and b > max(a, len(prompt))]
        ids = every[kept]
        senses, shares = _nearest(dictionary, ids, embeddings[kept])
        examples = _examples(dictionary, ids, senses) if exemplars else {}
        return [
            TokenSense(
                token=encoding.tokens[place],
                token_id=int(token),
                start=max(encoding.offsets[place][0] - len(prompt), 0),
                end=encoding.offsets[place][1] - len(prompt),
                sense=int(sense),
                probability=float(share),
                exemplar=examples.get((int(token), int(sense))),
            )
            for place, token, sense, share in zip(kept, ids, senses, shares, strict=True)
        ]

    def save(self, folder: str | Path, *, exemplars: bool = True) -> None:
        """Copy the student into a local folder, with or without the exemplars, which quote the corpus.

        Raises:
            InputError: the folder is the student's own.
            StudentError: a file links out of the student's folder.
        """
        target = StudentFiles(Path(folder))
        target.folder.mkdir(parents=True, exist_ok=True)
        if target.folder.resolve() == self._files.folder.resolve():
            raise InputError(f"{folder} is the student's own folder: give another folder")
        target.config.unlink(missing_ok=True)
        for path in self._files.present(exemplars=exemplars):
            copy = target.folder / path.relative_to(self._files.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy_file(checked_path(self._files, path), copy)

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, exemplars: bool = False, token: str | None = None
    ) -> str:
        """Upload the student's folder; see `msense.student.hub.push_student`."""
        return push_student(self._files.folder, repo_id, private=private, exemplars=exemplars, token=token)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16)

    def _batches(self, rows: list[np.ndarray], batch_size: int, *, plain: bool) -> Iterator[np.ndarray]:
        """Yield indices of texts, int64 [B]: in order for a static student, else by length to reduce padding."""
        lengths = np.array([len(row) for row in rows], np.int64)
        if isinstance(self._model, StaticEncoder):
            step = _STATIC_TOKENS if plain else max(1, _REPLACED // self.config.dim)
            ends = np.flatnonzero(np.diff(np.cumsum(lengths) // step)) + 1
            yield from (places for places in np.split(np.arange(len(rows)), ends) if len(places))
            return
        for places in token_batches(lengths, TOKEN_BUDGET.get(self.device.type, TOKEN_BUDGET["cuda"])):
            yield from np.split(places, range(batch_size, len(places), batch_size))

    def _plain(self, rows: list[np.ndarray], batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield indices of texts, int64 [B], and their sentence vectors, float32 [B, D]."""
        for places in batches:
            batch = [rows[i] for i in places]
            if isinstance(self._model, StaticEncoder):
                yield places, torch.from_numpy(self._model.sentences(batch))
                continue
            hidden, _, mask = self._forward(self._model, batch)
            yield places, pool(hidden, mask, self.config.pooling, normalize=self.config.normalize)

    def _replaced(
        self, rows: list[np.ndarray], batches: Iterable[np.ndarray], temperature: float | None
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield indices of texts, int64 [B], and vectors pooled from embeddings that are replaced many at once."""
        for group in _grouped(batches, rows, _REPLACED // self.config.dim):
            places = np.concatenate(group)
            ids = torch.from_numpy(np.concatenate([rows[i] for i in places]))
            parts = [self._senses([rows[i] for i in batch]) for batch in group]
            embeddings = parts[0] if len(parts) == 1 else torch.cat(parts)
            with torch.autocast(self.device.type, enabled=False):
                self.dictionary.replace(ids, embeddings, temperature, out=embeddings)
            lengths = torch.tensor([len(rows[i]) for i in places], device=self.device)
            yield places, pool_rows(embeddings, lengths, self.config.pooling, normalize=self.config.normalize)

    def _senses(self, rows: list[np.ndarray]) -> Tensor:
        """Return the sense embeddings of all tokens of some texts, float32 [N, D]."""
        if isinstance(self._model, StaticEncoder):
            return torch.from_numpy(self._model.tokens(rows)[1])
        _, senses, mask = self._forward(self._model, rows)
        return senses[mask]

    def _forward(self, model: Student, rows: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states and sense embeddings, float32 [B, L, D] each, and the mask [B, L]."""
        ids, mask = (tensor.to(self.device) for tensor in pad_ids(rows))
        output = model(ids, mask)
        return output.hidden.float(), output.senses.float(), mask


def _grouped(batches: Iterable[np.ndarray], rows: list[np.ndarray], tokens: int) -> Iterator[list[np.ndarray]]:
    """Group consecutive batches until a group has at least `tokens` tokens."""
    group: list[np.ndarray] = []
    size = 0
    for places in batches:
        group.append(places)
        size += sum(len(rows[i]) for i in places)
        if size >= tokens:
            yield group
            group, size = [], 0
    if group:
        yield group


def _progress_bar(total: int) -> Any:
    """Return a progress bar on stderr with one task."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True))
    bar.add_task("encode", total=total)
    return bar


def _uses_bfloat16(dtype: str, device: torch.device) -> bool:
    """Return whether to compute in bfloat16.

    Raises:
        InputError: the device does not support it.
    """
    supported = resolve_dtype("auto", device.type) == "bfloat16"
    if dtype == "bfloat16" and not supported:
        raise InputError(f"this {device.type} does not support bfloat16: use dtype='float32', which is faster here")
    return dtype == "bfloat16" or (dtype == "auto" and device.type != "cpu" and supported)


def _nearest(dictionary: SenseDictionary, ids: np.ndarray, embeddings: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return each token's nearest sense, int64 [N], -1 without senses, and its probability, float32 [N]."""
    most = int(np.diff(dictionary.offsets)[ids].max(initial=1))
    numbers, weights = dictionary.top_k(torch.from_numpy(ids), embeddings, most, DEFAULT_TEMPERATURE)
    return numbers[:, 0].cpu().numpy(), weights[:, 0].cpu().numpy()


def _examples(dictionary: SenseDictionary, ids: np.ndarray, senses: np.ndarray) -> dict[tuple[int, int], str]:
    """Return the nearest context of each sense that has one, by token and sense."""
    examples: dict[tuple[int, int], str] = {}
    pairs = {(int(token), int(sense)) for token, sense in zip(ids, senses, strict=True) if sense >= 0}
    for token in sorted({token for token, _ in pairs}):
        for exemplar in dictionary.exemplars(token):  # ordered by distance
            if (token, exemplar.sense) in pairs:
                examples.setdefault((token, exemplar.sense), _marked(exemplar))
    return examples


def _marked(exemplar: Exemplar) -> str:
    """Return a context on one line, its word in brackets."""
    space = " " * (len(exemplar.word) - len(exemplar.word.lstrip()))  # some tokens include the space before the word
    return f"{clean(exemplar.left)}{space}[{clean(exemplar.word).strip()}]{clean(exemplar.right)}"
