"""A shipped student as an encoder: texts in, sentence vectors out, and a sense for every token.

Comes in: a folder or a hub name, then texts. Goes out: float32 [n, D], as sentence-transformers' `encode` gives it, or tokens
with their senses. Holds the student, the ids of all texts, their vectors, and the embeddings of one batch, or, where senses
replace them, up to 3 · 4 · `_REPLACED` bytes of them; the dictionary is mapped when first asked for. Never imports Ray.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from msense.dictionary import SenseDictionary
from msense.dictionary.format import copy_file
from msense.dictionary.lookup import Exemplar
from msense.errors import BadInput, StudentError
from msense.hub import push_student, student_folder
from msense.pooling import pool, pool_rows
from msense.student.config import StudentConfig, StudentFiles
from msense.student.files import inside, load_student
from msense.student.shipping import check_dictionary
from msense.student.static import StaticBody
from msense.student.static_inference import StaticEncoder
from msense.student.student import Student
from msense.student.tokenizer import TextReader, padded
from msense.teacher import TOKEN_BUDGET, resolve_dtype, token_batches
from msense.text import clean

DEFAULT_TEMPERATURE = (
    1 / 3
)  # of soft replacement and of probabilities, in units of the dictionary's mean squared spread
_WEIGHTS = 1 << 22  # of senses held at a time
_STATIC_TOKENS = 1 << 16  # of a static student between two steps of the progress bar
_REPLACED = 1 << 23  # numbers of embeddings that are replaced at once: the more occurrences a token has, the faster

Replace = Literal["hard", "soft"]
Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TokenSense:
    """A token of a text and its sense.

    Attributes:
        token: as the vocabulary writes it.
        token_id: its number.
        start: where it begins in the text, in characters.
        end: where it ends.
        sense: number of its nearest sense; -1 for a token that has none.
        probability: of that sense among the token's, softmax(score / (temperature · unit)); 0 for a token without.
        exemplar: a context of the point nearest that sense in the dictionary's corpus, the token in brackets, if there is one.
    """

    token: str
    token_id: int
    start: int
    end: int
    sense: int
    probability: float
    exemplar: str | None


class _Batch(NamedTuple):
    """What a student says of some texts; rows of padding are meaningless."""

    hidden: Tensor  # float32 [B, L, D]
    senses: Tensor  # float32 [B, L, D]
    mask: Tensor  # bool [B, L]


class SenseEncoder:
    """A student with its tokenizer and dictionary; make one with `from_pretrained`.

    Attributes:
        config: what the student is.
        device: where it computes.
    """

    def __init__(self, folder: Path, *, device: str | None = None, dtype: Dtype = "auto") -> None:
        """Load a local folder; arguments as of `from_pretrained`."""
        if dtype not in get_args(Dtype):
            raise BadInput(f"dtype is {dtype!r}, but must be one of {get_args(Dtype)}")
        self._files = StudentFiles(folder)
        student = load_student(folder)
        self.config: StudentConfig = student.config
        self._reader = TextReader(inside(self._files, self._files.tokenizer), self.config)
        static = isinstance(student.body, StaticBody)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() and not static else "cpu"))
        self._model: Student | StaticEncoder
        if static and self.device.type == "cpu":
            self._bfloat16 = False  # its tables are, nothing else
            self._model = StaticEncoder(student, "float32" if dtype == "auto" else dtype)
        else:
            self._bfloat16 = _bfloat16(dtype, self.device)
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
        """Load a student that was shipped.

        Args:
            name_or_dir: its folder or URI, or a name on the hub.
            revision: branch, tag or commit on the hub.
            device: as torch names it; default: a GPU if there is one, but the CPU for a static student.
            dtype: in which a transformer computes; auto: float32 on a CPU, bfloat16 elsewhere. Vectors are float32.
            token: for a private repository on the hub; default: the one that is stored on this machine.

        Raises:
            StudentError: it cannot be had; or a file is missing, truncated, foreign, leads out of the folder or contradicts
                another.
            BadInput: the device does not compute in the dtype.
        """
        return cls(student_folder(name_or_dir, revision, token), device=device, dtype=dtype)

    @cached_property
    def dictionary(self) -> SenseDictionary:
        """The senses that the student speaks in, on its device.

        Raises:
            StudentError: the folder has no dictionary, or that of another student.
            DictionaryError: it is damaged.
        """
        folder = self._files.dictionary
        if not folder.is_dir():
            raise StudentError(
                f"{self._files.folder} holds no dictionary, as it was shipped for sentence vectors only: ship it again with "
                "senses='float16' or 'int8'"
            )
        dictionary = SenseDictionary.load(folder)
        check_dictionary(self.config, dictionary)
        return dictionary if self.device.type == "cpu" else dictionary.to(self.device)

    def encode(  # noqa: PLR0913 - the arguments of sentence-transformers' encode, and two of our own
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
        """Return the vectors of texts.

        Args:
            texts: one, or n of any length; what is beyond `config.max_length` tokens is left out.
            prompt: put before each; default: the one that the student was trained with.
            batch_size: texts that a transformer reads at once, at most; fewer where they are long.
            show_progress_bar: on stderr; default: no.
            convert_to_numpy: else a list of tensors [D].
            convert_to_tensor: one tensor on the encoder's device; goes before `convert_to_numpy`.
            normalize_embeddings: give every vector the length 1.
            replace: pool the senses that the student's embeddings are nearest to ("hard"), or means of senses ("soft"),
                in place of its embeddings; tokens without senses go as they are.
            temperature: of soft replacement, in units of the dictionary's mean squared spread.

        Returns:
            float32 [n, D], or [D] for a single text.

        Raises:
            BadInput: something is no text, or a setting is none.
            StudentError: senses are asked for, and there is no dictionary.
        """
        if replace not in (None, "hard", "soft") or batch_size < 1:
            raise BadInput(
                f"replace is {replace!r} and batch_size {batch_size}, but must be None, 'hard' or 'soft', and 1 or more"
            )
        rows = self._reader.ids([texts] if isinstance(texts, str) else texts, self._prompt(prompt))
        soft = temperature if replace == "soft" else None
        found = torch.empty(len(rows), self.config.dim, device=self.device)
        with torch.no_grad(), self._autocast(), _progress(len(rows), show_progress_bar) as advance:
            batches = self._batches(rows, batch_size, plain=replace is None)
            steps = self._plain(rows, batches) if replace is None else self._replaced(rows, batches, soft)
            for places, vectors in steps:
                found[torch.from_numpy(places).to(self.device)] = vectors
                advance(len(places))
            if normalize_embeddings:
                found = torch.nn.functional.normalize(found, dim=1)
        asked = found[0] if isinstance(texts, str) else found
        if convert_to_tensor or (isinstance(texts, str) and not convert_to_numpy):
            return asked
        return asked.cpu().numpy() if convert_to_numpy else list(asked)

    def tokens(self, text: str, *, prompt: str | None = None, exemplars: bool = True) -> list[TokenSense]:
        """Return the tokens of a text with their senses, without special ones and those of the prompt.

        Args:
            text: one; what is beyond `config.max_length` tokens is left out.
            prompt: put before it; default: the one that the student was trained with.
            exemplars: whether to look up an example of each sense.

        Raises:
            BadInput: it is no text.
            StudentError: there is no dictionary.
            DictionaryError: the dictionary is damaged.
        """
        dictionary = self.dictionary
        prompt = self._prompt(prompt)
        encoding = self._reader.encoding(text, prompt)
        with torch.no_grad(), self._autocast():
            batch = self._embedded([np.array(encoding.ids, np.int64)])
        kept = [
            i
            for i, (start, end) in enumerate(encoding.offsets)
            if not encoding.special_tokens_mask[i] and end > max(start, len(prompt))
        ]
        ids = np.array(encoding.ids, np.int64)[kept]
        senses, shares = _nearest(dictionary, ids, batch.senses[0, kept])
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
        """Copy the student's files into a folder; config.json last.

        Args:
            folder: a local one; made if missing.
            exemplars: whether the dictionary's examples go too: they quote the corpus.

        Raises:
            StudentError: a file leads out of the student's folder.
        """
        target = StudentFiles(Path(folder))
        target.folder.mkdir(parents=True, exist_ok=True)
        if target.folder.resolve() == self._files.folder.resolve():
            raise BadInput(f"{folder} is where this student lies: give another folder")
        target.config.unlink(missing_ok=True)
        for path in self._files.present(exemplars=exemplars):
            copy = target.folder / path.relative_to(self._files.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy_file(inside(self._files, path), copy)

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, exemplars: bool = False, token: str | None = None
    ) -> str:
        """Upload the student's folder; arguments, result and errors are those of `msense.hub.push_student`."""
        return push_student(self._files.folder, repo_id, private=private, exemplars=exemplars, token=token)

    def _prompt(self, prompt: str | None) -> str:
        return self.config.prompt if prompt is None else prompt

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16)

    def _batches(self, rows: list[np.ndarray], batch_size: int, *, plain: bool) -> Iterator[np.ndarray]:
        """Yield places of texts, int64 [B]: of similar length, so that little is padded; of a static student in order."""
        lengths = np.array([len(row) for row in rows], np.int64)
        if isinstance(self._model, StaticEncoder):
            step = _STATIC_TOKENS if plain else max(1, _REPLACED // self.config.dim)
            ends = np.flatnonzero(np.diff(np.cumsum(lengths) // step)) + 1
            yield from (places for places in np.split(np.arange(len(rows)), ends) if len(places))
            return
        for places in token_batches(np.maximum(lengths, 1), TOKEN_BUDGET.get(self.device.type, TOKEN_BUDGET["cuda"])):
            yield from np.split(places, range(batch_size, len(places), batch_size))

    def _plain(self, rows: list[np.ndarray], batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield places of texts, int64 [B], and their sentence vectors, float32 [B, D]."""
        for places in batches:
            batch = [rows[i] for i in places]
            if isinstance(self._model, StaticEncoder):
                yield places, torch.from_numpy(self._model.sentences(batch))
                continue
            output = self._embedded(batch)
            yield places, pool(output.hidden, output.mask, self.config.pooling, normalize=self.config.normalize)

    def _replaced(
        self, rows: list[np.ndarray], batches: Iterable[np.ndarray], temperature: float | None
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield places of texts and vectors of replaced embeddings; many batches are replaced at once."""
        for group in _grouped(batches, rows, _REPLACED // self.config.dim):
            places = np.concatenate(group)
            ids = np.concatenate([rows[i] for i in places])
            every, at = torch.empty(len(ids), self.config.dim, device=self.device), 0
            for part in group:
                batch = [rows[i] for i in part]
                at += self._write_senses(batch, every[at : at + sum(map(len, batch))])
            with torch.autocast(self.device.type, enabled=False):
                self.dictionary.replace(torch.from_numpy(ids), every, temperature, out=every)
            lengths = torch.tensor([len(rows[i]) for i in places], device=self.device)
            yield places, pool_rows(every, lengths, self.config.pooling, normalize=self.config.normalize)

    def _write_senses(self, rows: list[np.ndarray], out: Tensor) -> int:
        """Write what is compared with the senses of all tokens to out, float32 [N, D]; return N."""
        if isinstance(self._model, StaticEncoder):
            out.copy_(torch.from_numpy(self._model.tokens(rows)[1]))
        else:
            output = self._embedded(rows)
            torch.index_select(output.senses.flatten(0, 1), 0, output.mask.flatten().nonzero()[:, 0], out=out)
        return len(out)

    def _embedded(self, rows: list[np.ndarray]) -> _Batch:
        """Run the student on some texts."""
        ids, mask = (tensor.to(self.device) for tensor in padded(rows))
        if isinstance(self._model, Student):
            output = self._model(ids, mask)
            return _Batch(output.hidden.float(), output.senses.float(), mask)
        both = []
        for own in self._model.tokens(rows):
            wide = torch.zeros(*mask.shape, self.config.dim)
            wide[mask] = torch.from_numpy(own)
            both.append(wide)
        return _Batch(both[0], both[1], mask)


def _grouped(batches: Iterable[np.ndarray], rows: list[np.ndarray], tokens: int) -> Iterator[list[np.ndarray]]:
    """Group batches of texts until a group has so many tokens."""
    group: list[np.ndarray] = []
    held = 0
    for places in batches:
        group.append(places)
        held += sum(len(rows[i]) for i in places)
        if held >= tokens:
            yield group
            group, held = [], 0
    if group:
        yield group


@contextmanager
def _progress(total: int, shown: bool | None) -> Iterator[Callable[[int], None]]:
    """Give a function that moves a progress bar by so many texts, or does nothing."""
    if not shown:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("encode", total=total)
        yield lambda texts: bar.advance(task, texts)


def _bfloat16(dtype: str, device: torch.device) -> bool:
    """Tell whether a student computes in bfloat16.

    Raises:
        BadInput: the device does not compute in it.
    """
    able = resolve_dtype("auto", device.type) == "bfloat16"
    if dtype == "bfloat16" and not able:
        raise BadInput(f"this {device.type} does not compute in bfloat16: give dtype='float32', which is faster here")
    return dtype == "bfloat16" or (dtype == "auto" and device.type != "cpu" and able)


def _nearest(dictionary: SenseDictionary, ids: np.ndarray, embeddings: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return each token's nearest sense, int64 [N], -1 without, and its share among all of its senses, float32 [N]."""
    most = int(np.diff(dictionary.offsets)[ids].max(initial=1))
    senses, shares = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    step = max(1, _WEIGHTS // most)
    for start in range(0, len(ids), step):
        own = torch.from_numpy(ids[start : start + step])
        numbers, weights = dictionary.weigh(own, embeddings[start : start + step], most, DEFAULT_TEMPERATURE)
        senses.append(numbers[:, 0].cpu().numpy())
        shares.append(weights[:, 0].cpu().numpy())
    return np.concatenate(senses), np.concatenate(shares)


def _examples(dictionary: SenseDictionary, ids: np.ndarray, senses: np.ndarray) -> dict[tuple[int, int], str]:
    """Return the nearest context of each sense that has one, by token and sense."""
    found: dict[tuple[int, int], str] = {}
    wanted = {(int(token), int(sense)) for token, sense in zip(ids, senses, strict=True) if sense >= 0}
    for token in sorted({token for token, _ in wanted}):
        for exemplar in dictionary.exemplars(token):
            if (token, exemplar.sense) in wanted:
                found.setdefault((token, exemplar.sense), _shown(exemplar))  # by rank: the first is the nearest
    return found


def _shown(exemplar: Exemplar) -> str:
    """Return a context on one line, its word in brackets."""
    space = " " * (len(exemplar.word) - len(exemplar.word.lstrip()))  # some tokenizers count it as the word's own
    return f"{clean(exemplar.left)}{space}[{clean(exemplar.word).strip()}]{clean(exemplar.right)}"
