"""Encode texts with a saved student: sentence vectors, and a sense for every token.

The interface follows sentence-transformers' `encode`. Memory: the student, all token ids and vectors, and the
embeddings of one batch, or with replacement up to 16 · `_REPLACED` bytes of them. The dictionary is memory-mapped on
first use. Never imports Ray.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from msense.constants import DEFAULT_TEMPERATURE, Replace
from msense.dictionary import SenseDictionary
from msense.errors import InputError, MsenseError, StudentError
from msense.student.config import StudentFiles, check_dictionary
from msense.student.files import checked_path, load_student, student_folder
from msense.student.static import TokenTable
from msense.student.static_inference import StaticEncoder, split_by_size
from msense.student.student import Student
from msense.student.tokenizer import StudentTokenizer, pad_ids
from msense.teacher.batching import TOKEN_BUDGET, token_batches
from msense.teacher.body import resolve_dtype
from msense.text import clean, first_line, redact
from msense.tokenizer import prompt_length

_STATIC_TOKENS = 1 << 16  # tokens per step of a static student's progress bar
_REPLACED = 1 << 23  # numbers replaced at once: replacement is faster with more occurrences of each token
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
        self.config = student.config
        self._reader = StudentTokenizer(checked_path(self._files, self._files.tokenizer), self.config)
        static = isinstance(student.body, TokenTable)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() and not static else "cpu"))
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
    ) -> "SenseEncoder":
        """Load a saved student.

        Args:
            name_or_dir: folder or URI of a student or of the run that made it, or a Hugging Face hub name.
            revision: branch, tag or commit on the hub.
            device: torch device; default: a GPU if available, but the CPU for a static student.
            dtype: in which a transformer computes; auto: float32 on a CPU, bfloat16 elsewhere. Vectors are float32, and
                so are all numbers of a static student on a CPU.
            token: for a private hub repository; default: the one stored on this machine.

        Raises:
            StudentError: the student is unavailable, or a file is missing, truncated, malformed, inconsistent, or
                links out of the folder.
        """
        return cls(student_folder(name_or_dir, revision, token), device=device, dtype=dtype)

    @cached_property
    def dictionary(self) -> SenseDictionary:
        """The student's dictionary, on its device; StudentError if there is none, or that of another student."""
        folder = self._files.dictionary
        if self.config.is_table:
            raise StudentError("a table knows no senses: distil a student of another kind, such as static")
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
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
        replace: Replace | None = None,
        temperature: float = DEFAULT_TEMPERATURE,
    ) -> np.ndarray | Tensor | list[Tensor]:
        """Return sentence vectors, float32 [n, D'], or [D'] for a single text; D' is `config.sentence_dim`.

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
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise InputError(f"invalid batch_size {batch_size!r}: use an integer of 1 or more")
        prompt = self._prompt(prompt)
        rows = self._reader.ids(_listed(texts), prompt)
        skip = self._skip(prompt)
        vectors = torch.empty(len(rows), self.config.sentence_dim, dtype=torch.float32, device=self.device)
        with torch.no_grad(), self._autocast():
            groups = self._groups(rows, batch_size, replaced=replace is not None)
            for group in _with_progress(groups) if show_progress_bar else groups:
                batches = [[rows[i] for i in batch] for batch in group]
                if replace is None:
                    pooled = torch.cat([self._pooled(batch, skip) for batch in batches])
                else:
                    pooled = self._replaced(batches, skip, temperature if replace == "soft" else None)
                vectors[torch.from_numpy(np.concatenate(group)).to(self.device)] = pooled
        if normalize_embeddings:
            vectors = torch.nn.functional.normalize(vectors, dim=1)
        result = vectors[0] if isinstance(texts, str) else vectors
        if convert_to_tensor or (isinstance(texts, str) and not convert_to_numpy):
            return result
        return result.cpu().numpy() if convert_to_numpy else list(result)

    def tokens(self, text: str, *, prompt: str | None = None) -> list[TokenSense]:
        """Return the tokens of a text, truncated to `config.max_length`, without special tokens and those of the prompt.

        Raises:
            InputError: the text is invalid.
            StudentError: the student has no dictionary.
            DictionaryError: the dictionary is damaged.
        """
        dictionary, prompt = self.dictionary, self._prompt(prompt)
        encoding = self._reader.encoding(text, prompt)
        every = np.array(encoding.ids, np.int64)
        with torch.no_grad(), self._autocast():
            embeddings = self._senses([every])
        places = zip(encoding.special_tokens_mask, encoding.offsets, strict=True)
        kept = [i for i, (special, (a, b)) in enumerate(places) if not special and b > max(a, len(prompt))]
        ids = every[kept]
        most = int(np.diff(dictionary.offsets)[ids].max(initial=1))  # probabilities are over all senses of a token
        numbers, weights = dictionary.top_k(torch.from_numpy(ids), embeddings[kept], most, DEFAULT_TEMPERATURE)
        senses, shares = numbers[:, 0].tolist(), weights[:, 0].tolist()
        examples = _examples(dictionary, set(zip(ids.tolist(), senses, strict=True)))
        return [
            TokenSense(
                token=encoding.tokens[place],
                token_id=encoding.ids[place],
                start=max(encoding.offsets[place][0] - len(prompt), 0),
                end=encoding.offsets[place][1] - len(prompt),
                sense=sense,
                probability=share,
                exemplar=examples.get((encoding.ids[place], sense)),
            )
            for place, sense, share in zip(kept, senses, shares, strict=True)
        ]

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, exemplars: bool = False, token: str | None = None
    ) -> str:
        """Upload the student's files to the hub, creating the repository if needed; return the URL of the commit.

        The dictionary's exemplars, which quote the corpus, are left out by default.

        Raises:
            StudentError: a file links outside the folder.
            MsenseError: the name is invalid, or the hub is unavailable or refuses.
        """
        from huggingface_hub import HfApi

        files, folder = self._files.present(exemplars=exemplars), self._files.folder
        names = [checked_path(self._files, path).relative_to(folder).as_posix() for path in files]
        message = "Add a student trained with msense"
        try:
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            uploaded = api.upload_folder(
                repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message=message
            )
        except (OSError, ValueError) as error:
            raise MsenseError(
                f"cannot push to {redact(repo_id)!r} ({first_line(error)}): check the name (owner/model), the connection "
                "and your write access (hf auth login)"
            ) from error
        return str(uploaded)

    def _prompt(self, given: str | None) -> str:
        return self.config.prompt if given is None else given

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

    def _skip(self, prompt: str) -> int:
        """Return how many tokens of a text with this prompt are not pooled."""
        return 0 if self.config.include_prompt else prompt_length(self._reader.tokenizer, prompt)

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


def _listed(texts: str | Iterable[str]) -> list[str]:
    """Return one text or several as a list."""
    if isinstance(texts, str):
        return [texts]
    single = isinstance(texts, bytes | bytearray | memoryview | Mapping) or not isinstance(texts, Iterable)
    if single or getattr(texts, "ndim", 1) != 1:  # a table of pandas iterates over the names of its columns
        raise InputError(f"texts has type {type(texts).__name__}: give a str, or a list of them")
    return list(texts)


def _with_progress(groups: list[list[np.ndarray]]) -> Iterable[list[np.ndarray]]:
    """Iterate with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import track

    return track(groups, "encode", console=Console(stderr=True))


def _examples(dictionary: SenseDictionary, pairs: set[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """Return the nearest context of each (token, sense) that has one, on one line, its word in brackets."""
    examples: dict[tuple[int, int], str] = {}
    for token in {token for token, sense in pairs if sense >= 0}:
        for exemplar in dictionary.exemplars(token):  # ordered by distance
            if (pair := (token, exemplar.sense)) in pairs and pair not in examples:
                word = exemplar.word.lstrip()
                space = " " * (len(exemplar.word) - len(word))  # some tokens include the space before the word
                examples[pair] = f"{clean(exemplar.left)}{space}[{clean(word).strip()}]{clean(exemplar.right)}"
    return examples
