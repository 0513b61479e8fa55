"""Models under evaluation: the teacher (plain, replaced by senses, truncated), students, sentence-transformers, model2vec.

Every model returns sentence vectors; teachers and students also return token embeddings. Memory: one model, and the token
embeddings of one slab of texts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Encoding

from msense.dictionary import SenseDictionary
from msense.errors import InputError
from msense.evaluation import model2vec
from msense.evaluation.spec import Spec
from msense.io import storage
from msense.student import load_student
from msense.student.config import StudentFiles
from msense.student.encoder import SenseEncoder
from msense.student.hub import student_folder
from msense.student.tokenizer import StudentTokenizer, pad_ids
from msense.teacher.batching import TOKEN_BUDGET, pad_batch, token_batches
from msense.teacher.body import resolve_dtype
from msense.teacher.files import body_folder, loading
from msense.teacher.model import Teacher
from msense.teacher.pooling import pool_rows
from msense.teacher.spec import TeacherOptions, load_teacher_info

TEXTS_PER_SLAB = 512  # texts whose token embeddings are held at once


@dataclass(frozen=True)
class TokenEmbeddings:
    """Token embeddings of P texts with N tokens, special tokens included.

    Attributes:
        ids: int64 [N].
        offsets: int64 [P + 1], first token of each text.
        spans: int64 [N, 2], character span of each token in its text; (0, 0) for special tokens.
        hidden: float32 [N, D], pooled into the sentence vector: replaced by senses if the model replaces.
        senses: float32 [N, D], compared with the senses of each token: never replaced. May be the same array.
    """

    ids: np.ndarray
    offsets: np.ndarray
    spans: np.ndarray
    hidden: np.ndarray
    senses: np.ndarray


class Model(Protocol):
    """A model that encodes texts into vectors."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return sentence vectors, float32 [n, D]."""

    def parameters(self) -> int:
        """Return the number of weights, without a dictionary's."""

    def files(self) -> list[Path]:
        """Return the files needed to use the model, without a dictionary's."""


@contextmanager
def open_model(spec: Spec, device: str, threads: int) -> Iterator[Any]:
    """Load a model as `make_model` does, and end its process, if any, on exit."""
    model = make_model(spec, device, threads)
    try:
        yield model
    finally:
        if isinstance(model, Model2Vec):
            model.close()


class TokenModel(Model, Protocol):
    """A model with token embeddings and, optionally, a dictionary of their senses."""

    spec: Spec

    @property
    def dictionary(self) -> SenseDictionary | None:
        """Senses of the model's tokens."""

    def read(self, texts: Sequence[str]) -> TokenEmbeddings:
        """Return the embeddings of all tokens; 8·N·D bytes."""

    def tokens(self, texts: Sequence[str]) -> int:
        """Return the number of tokens of the texts."""


def make_model(spec: Spec, device: str, threads: int) -> Model:
    """Load a model; InputError if it cannot be loaded, or dictionary and teacher do not match."""
    torch.set_num_threads(threads)
    if spec.kind == "student":
        return StudentModel(spec, device)
    if spec.kind in ("teacher", "replaced", "truncated"):
        return TeacherModel(spec, device, threads)
    if spec.kind == "model2vec":
        return Model2Vec(spec, threads)
    return SentenceModel(spec, device)


def iter_slabs(texts: Sequence[str], size: int = TEXTS_PER_SLAB) -> Iterator[Sequence[str]]:
    """Yield slices of at most `size` texts."""
    yield from (texts[start : start + size] for start in range(0, len(texts), size))


def folder_of_student(source: str) -> Path:
    """Return the local folder of a student given by folder, URI, run folder or Hub name."""
    inside = storage.join(source, "student")
    return student_folder(inside if storage.exists(storage.join(inside, "config.json")) else source)


class TeacherModel:
    """The teacher: plain, with every embedding replaced by senses of a dictionary, or truncated to its first layers.

    Example:
        >>> model = TeacherModel(Spec("teacher", "teacher", teacher="all-MiniLM-L6-v2"), "cpu", threads=1)
        >>> model.encode(["a text"]).shape
        (1, 384)
    """

    def __init__(self, spec: Spec, device: str, threads: int, like: SenseDictionary | None = None) -> None:
        """Load a teacher with the layer, prompt and maximum length of its dictionary, or of the dictionary `like`."""
        self.spec = spec
        self.dictionary = SenseDictionary.load(spec.source) if spec.kind == "replaced" else None
        settings: dict[str, Any] = {"revision": spec.revision}
        if (given := self.dictionary or like) is not None:
            own = given.config
            settings |= {"layer": own.layer, "prompt": own.prompt, "max_length": own.max_length or None}
        self.info, self.tokenizer = load_teacher_info(spec.teacher, TeacherOptions(**settings))
        if self.dictionary is not None:
            wanted = self.dictionary.config.teacher
            if wanted.fingerprint not in ("", self.info.fingerprint):
                raise InputError(
                    f"{spec.name}: the weights of teacher {self.info.name!r} differ from those of the dictionary's teacher, "
                    f"{wanted.name!r}: pass that one as --teacher"
                )
        self.tokenizer.enable_truncation(self.info.max_length)
        self._teacher = Teacher(
            spec.teacher,
            revision=spec.revision,
            layer=self.info.layer,
            dtype=resolve_dtype(spec.dtype, device),
            device=device,
            threads=threads,
            keep=f"layers:{spec.layers}" if spec.layers else None,
        )
        self._budget = TOKEN_BUDGET[device]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return sentence vectors, float32 [n, D], with the teacher's own pooling."""
        vectors = [np.empty((0, self.info.dim), np.float32)]
        for slab in iter_slabs(texts):
            read = self.read(slab)
            hidden, lengths = torch.from_numpy(read.hidden), torch.from_numpy(np.diff(read.offsets))
            vectors.append(pool_rows(hidden, lengths, self.info.pooling, normalize=self.info.normalize).numpy())
        return np.concatenate(vectors)

    def read(self, texts: Sequence[str]) -> TokenEmbeddings:
        """Return the embeddings of all tokens."""
        encodings = self._encoded(texts)
        rows, offsets = _rows(encodings)
        plain = np.empty((offsets[-1], self.info.dim), np.float32)
        for batch, places in _batches(offsets, self._budget):
            ids, mask = pad_batch([rows[i] for i in batch])
            if mask.any():
                plain[places] = self._teacher.embed(ids, mask).float().cpu().numpy()[mask]
        ids = np.concatenate([*rows, np.empty(0, np.int64)])
        hidden = plain if self.dictionary is None else _replaced(self.dictionary, ids, plain, self.spec)
        return TokenEmbeddings(ids, offsets, _spans(encodings, len(self.info.prompt)), hidden, plain)

    def tokens(self, texts: Sequence[str]) -> int:
        """Return the number of tokens of the texts."""
        return sum(len(encoding.ids) for encoding in self._encoded(texts))

    def parameters(self) -> int:
        """Return the number of weights."""
        return sum(p.numel() for p in self._teacher.engine.module.parameters())

    def files(self) -> list[Path]:
        """Return weights and tokenizer."""
        folder = body_folder(self.spec.teacher, self.spec.revision)
        return [*folder.glob("*.safetensors"), folder / "config.json", *folder.glob("tokenizer.json")]

    def _encoded(self, texts: Sequence[str]) -> list[Encoding]:
        return self.tokenizer.encode_batch([self.info.prompt + text for text in texts])


class StudentModel:
    """A student, plain or with every token embedding replaced by senses."""

    def __init__(self, spec: Spec, device: str) -> None:
        self.spec = spec
        self._folder = folder_of_student(spec.source)
        self._encoder = SenseEncoder.from_pretrained(self._folder, device=device)
        self._reader = StudentTokenizer(StudentFiles(self._folder).tokenizer, self._encoder.config)
        self._budget = TOKEN_BUDGET[device]

    @cached_property
    def dictionary(self) -> SenseDictionary | None:
        """Senses of the student, if its folder includes them."""
        return self._encoder.dictionary if StudentFiles(self._folder).dictionary.is_dir() else None

    @cached_property
    def _student(self) -> torch.nn.Module:
        return load_student(self._folder).to(self._encoder.device)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return sentence vectors, float32 [n, D]."""
        return np.asarray(self._encoder.encode(texts, replace=self.spec.replace, temperature=self.spec.temperature))

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> TokenEmbeddings:
        """Return the embeddings of all tokens from both outputs; `hidden` is replaced if the spec says so."""
        prompt = self._encoder.config.prompt
        encodings = [self._reader.encoding(text, prompt) for text in texts]
        rows, offsets = _rows(encodings)
        hidden = np.empty((offsets[-1], self._encoder.config.dim), np.float32)
        senses = np.empty_like(hidden)
        for batch, places in _batches(offsets, self._budget):
            ids, mask = (tensor.to(self._encoder.device) for tensor in pad_ids([rows[i] for i in batch]))
            output = self._student(ids, mask)
            hidden[places] = output.hidden[mask].float().cpu().numpy()
            senses[places] = output.senses[mask].float().cpu().numpy()
        every = np.concatenate([*rows, np.empty(0, np.int64)])
        if self.spec.replace is not None:
            hidden = _replaced(self._encoder.dictionary, every, senses, self.spec)
        return TokenEmbeddings(every, offsets, _spans(encodings, len(prompt)), hidden, senses)

    def tokens(self, texts: Sequence[str]) -> int:
        """Return the number of tokens of the texts."""
        return sum(map(len, self._reader.ids(texts, self._encoder.config.prompt)))

    def parameters(self) -> int:
        """Return the number of weights."""
        return sum(p.numel() for p in self._student.parameters())

    def files(self) -> list[Path]:
        """Return weights, tokenizer and config."""
        files = StudentFiles(self._folder)
        return [files.weights, files.tokenizer, files.config]


class SentenceModel:
    """Any sentence-transformers model; code shipped with a model is never run."""

    def __init__(self, spec: Spec, device: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise InputError(
                f"{spec.name} needs sentence-transformers, which is not installed: pip install msense[evaluation]"
            ) from error
        with loading(repr(spec.source)):
            self.model = SentenceTransformer(
                spec.source,
                device=device,
                revision=spec.revision,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        self.spec = spec

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return sentence vectors, float32 [n, D]."""
        return np.asarray(self.model.encode(list(texts), show_progress_bar=False), np.float32)

    def parameters(self) -> int:
        """Return the number of weights."""
        return sum(p.numel() for p in self.model.parameters())

    def files(self) -> list[Path]:
        """Return the files of a local folder; none for a Hub model, whose cache consists of links."""
        folder = Path(self.spec.source)
        return [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []


class Model2Vec:
    """model2vec, distilled on the fly from the teacher in a Python that has it."""

    def __init__(self, spec: Spec, threads: int) -> None:
        self._peer = model2vec.Peer(spec.python, body_folder(spec.teacher, spec.revision), threads)
        self.encode, self.close = self._peer.encode, self._peer.close

    def parameters(self) -> int:
        """Return the number of weights."""
        return self._peer.parameters

    def files(self) -> list[Path]:
        """Return weights, tokenizer and config."""
        return self._peer.files

    @property
    def seconds(self) -> float:
        """Duration of the last encoding, by the process's own clock."""
        return self._peer.seconds

    @property
    def peak_memory(self) -> int:
        """Peak memory of the process in bytes."""
        return self._peer.peak_memory


def _rows(encodings: Sequence[Encoding]) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the token ids of each text and their offsets, int64 [P + 1]."""
    rows = [np.array(encoding.ids, np.int64) for encoding in encodings]
    return rows, np.cumsum([0, *map(len, rows)], dtype=np.int64)


def _batches(offsets: np.ndarray, budget: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches of texts of similar length, and the positions of their tokens."""
    for batch in token_batches(np.maximum(np.diff(offsets), 1), budget):
        yield batch, np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in batch])


def _replaced(dictionary: SenseDictionary, ids: np.ndarray, points: np.ndarray, spec: Spec) -> np.ndarray:
    temperature = spec.temperature if spec.replace == "soft" else None
    return dictionary.replace(ids, points, temperature, metric=spec.metric)


def _spans(encodings: Sequence[Encoding], prompt: int) -> np.ndarray:
    """Return the character span of each token in its text; (0, 0) for special tokens and those of the prompt."""
    spans = np.array([span for encoding in encodings for span in encoding.offsets], np.int64).reshape(-1, 2)
    return np.maximum(spans - prompt, 0)
