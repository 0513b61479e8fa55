"""Models under evaluation: the teacher (plain, replaced, truncated), students, sentence-transformers, model2vec, and BM25.

Every model but BM25 returns sentence vectors; teachers and students also return token embeddings. Memory: one model, and the
token embeddings of one slab of texts.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from tokenizers import Encoding
from torch import Tensor

from msense.dictionary import SenseDictionary
from msense.errors import InputError
from msense.evaluation.model2vec import Model2Vec
from msense.evaluation.search import Bm25
from msense.evaluation.spec import Spec
from msense.student import load_student
from msense.student.config import dictionary_mismatch
from msense.student.encoder import SenseEncoder
from msense.student.files import student_folder
from msense.student.layout import StudentFiles
from msense.student.tokenizer import StudentTokenizer
from msense.teacher.batching import TOKEN_BUDGET, Batch, iter_batches
from msense.teacher.body import resolve_dtype
from msense.teacher.files import body_folder
from msense.teacher.model import Teacher
from msense.teacher.pooling import load_head
from msense.teacher.spec import TeacherOptions, load_teacher_info
from msense.text import first_line

TEXTS_PER_SLAB = 512  # texts whose token embeddings are held at once


@dataclass(frozen=True)
class TokenEmbeddings:
    """Token embeddings of P texts with N tokens, special tokens included."""

    ids: np.ndarray  # int64 [N]
    offsets: np.ndarray  # int64 [P + 1], first token of each text
    spans: np.ndarray  # int64 [N, 2], characters of each token; (0, 0) for special tokens and those of a prompt
    hidden: np.ndarray  # float32 [N, D], pooled into the sentence vector: replaced by senses if the model replaces
    senses: np.ndarray  # float32 [N, D], compared with each token's senses: never replaced; may be the same array

    @property
    def texts(self) -> np.ndarray:
        """Index of each token's text, int64 [N]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


class Model(Protocol):
    """A model that encodes texts into vectors."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return sentence vectors, float32 [n, D]."""


def encode_as(model: Model, role: Literal["query", "document"], texts: Sequence[str]) -> np.ndarray:
    """Return vectors of queries or documents, float32 [n, D], by the model's own method for them if it has one."""
    own = getattr(model, f"encode_{role}", model.encode)
    return np.asarray(own(texts), np.float32)


def make_model(spec: Spec, device: str, threads: int) -> Model | Bm25:
    """Load a model; InputError if it cannot be loaded, or dictionary and teacher do not match."""
    torch.set_num_threads(threads)
    match spec.kind:
        case "bm25":
            return Bm25(spec.stemmer)
        case "student":
            return StudentModel(spec, device)
        case "encoder":
            return SentenceModel(spec, device)
        case "model2vec":
            return Model2Vec(spec.python, body_folder(spec.teacher, spec.revision), threads)
    return TeacherModel(spec, device, threads)


@contextmanager
def open_model(spec: Spec, device: str, threads: int) -> Iterator[Any]:
    """Load a model as `make_model` does, and end its process, if any, on exit."""
    model = make_model(spec, device, threads)
    with closing(model) if isinstance(model, Model2Vec) else nullcontext():
        yield model


def iter_slabs(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield slices of at most `TEXTS_PER_SLAB` texts."""
    yield from (texts[start : start + TEXTS_PER_SLAB] for start in range(0, len(texts), TEXTS_PER_SLAB))


class TokenModel(ABC):
    """A model with token embeddings and, optionally, a dictionary of their senses."""

    spec: Spec
    dictionary: SenseDictionary | None
    dim: int  # width D of the embeddings
    prompt: str  # before every text
    device: str
    module: torch.nn.Module
    outputs = 1  # 2 if hidden states and sense embeddings differ

    @abstractmethod
    def _encodings(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of prompt + text for each text."""

    @abstractmethod
    def _embed(self, batch: Batch) -> Sequence[Tensor]:
        """Return the outputs of a batch, [B, L, D] each."""

    def read(self, texts: Sequence[str]) -> TokenEmbeddings:
        """Return the embeddings of all tokens; 8·N·D bytes."""
        encodings = self._encodings(texts)
        rows = [np.array(encoding.ids, np.int64) for encoding in encodings]
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        outputs = [np.empty((offsets[-1], self.dim), np.float32) for _ in range(self.outputs)]
        for batch in iter_batches(rows, TOKEN_BUDGET[self.device]):
            if not batch.mask.any():
                continue
            places = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in batch.rows])
            for output, tensor in zip(outputs, self._embed(batch), strict=True):
                output[places] = tensor.float().cpu().numpy()[batch.mask]
        ids = np.concatenate([*rows, np.empty(0, np.int64)])
        hidden, senses = outputs[0], outputs[-1]
        if self.spec.replace is not None and self.dictionary is not None:
            temperature = self.spec.temperature if self.spec.replace == "soft" else None
            hidden = self.dictionary.replace(ids, senses, temperature, metric=self.spec.metric)
        spans = np.array([span for encoding in encodings for span in encoding.offsets], np.int64).reshape(-1, 2)
        return TokenEmbeddings(ids, offsets, np.maximum(spans - len(self.prompt), 0), hidden, senses)

    def parameters(self) -> int:
        """Return the number of weights, without a dictionary's."""
        return sum(p.numel() for p in self.module.parameters())

    def tokens(self, texts: Sequence[str]) -> int:
        """Return the number of tokens of the texts."""
        return sum(len(encoding.ids) for encoding in self._encodings(texts))


class TeacherModel(TokenModel):
    """The teacher: plain, with every embedding replaced by senses of a dictionary, or truncated to its first layers.

    Example:
        >>> model = TeacherModel(Spec("teacher", "teacher", teacher="all-MiniLM-L6-v2"), "cpu", threads=1)
        >>> model.encode(["a text"]).shape
        (1, 384)
    """

    def __init__(self, spec: Spec, device: str, threads: int, like: SenseDictionary | None = None) -> None:
        """Load a teacher with the layer, prompt and maximum length of its dictionary, or of the dictionary `like`."""
        self.spec, self.device = spec, device
        self.dictionary = SenseDictionary.load(spec.source) if spec.kind == "replaced" else None
        settings: dict[str, Any] = {"revision": spec.revision, "attention": spec.attention}
        given = like if self.dictionary is None else self.dictionary
        if given is not None:
            own = given.config
            settings |= {"layer": own.layer, "prompt": own.prompt, "max_length": own.max_length or None}
            settings["attention"] = own.attention if spec.attention == "auto" else spec.attention
        self.info, self.tokenizer = load_teacher_info(spec.teacher, TeacherOptions(**settings))
        self.dim, self.prompt = self.info.dim, self.info.prompt
        if self.dictionary is not None:
            values = (self.info.tokenizer_fingerprint, self.info.fingerprint, self.dim, self.info.vocab_size)
            if mismatch := dictionary_mismatch(self.dictionary.config, *values):
                raise InputError(
                    f"{spec.name}: teacher {self.info.name!r} is not the dictionary's, which has {mismatch}: pass "
                    f"{self.dictionary.config.teacher.name!r} as --teacher"
                )
        self.tokenizer.enable_truncation(self.info.max_length, direction=self.info.truncation_side)
        self._teacher = Teacher(
            spec.teacher,
            revision=spec.revision,
            layer=self.info.layer,
            dtype=resolve_dtype(spec.dtype, device),
            device=device,
            threads=threads,
            keep=f"layers:{spec.layers}" if spec.layers else None,
            attention=self.info.attention,
        )
        self.module = self._teacher.engine.module
        self._head = load_head(spec.teacher, self.info)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return the teacher's sentence vectors, float32 [n, D']."""
        vectors = []
        for slab in iter_slabs(texts):
            read = self.read(slab)
            hidden, lengths = torch.from_numpy(read.hidden), torch.from_numpy(np.diff(read.offsets))
            with torch.no_grad():
                vectors.append(self._head.of_rows(hidden, lengths).numpy())
        return np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32)

    def _encodings(self, texts: Sequence[str]) -> list[Encoding]:
        return self.tokenizer.encode_batch([self.prompt + text for text in texts])

    def _embed(self, batch: Batch) -> Sequence[Tensor]:
        return [self._teacher.embed(batch.ids, batch.mask)]

    def files(self) -> list[Path]:
        """Return weights and tokenizer."""
        folder = body_folder(self.spec.teacher, self.spec.revision)
        return [*folder.glob("*.safetensors"), folder / "config.json", *folder.glob("tokenizer.json")]


class StudentModel(TokenModel):
    """A student, plain or with every token embedding replaced by senses."""

    outputs = 2

    def __init__(self, spec: Spec, device: str) -> None:
        self.spec, self.device = spec, device
        self._folder = student_folder(spec.source)
        self._encoder = SenseEncoder.from_pretrained(self._folder, device=device)
        self.dim, self.prompt = self._encoder.config.dim, self._encoder.config.prompt
        self._tokenizer = StudentTokenizer(StudentFiles(self._folder).tokenizer, self._encoder.config)

    @cached_property
    def dictionary(self) -> SenseDictionary | None:  # type: ignore[override]
        """Senses of the student, if its folder includes them; StudentError if it must replace and they are missing."""
        wanted = self.spec.replace is not None or StudentFiles(self._folder).dictionary.is_dir()
        return self._encoder.dictionary if wanted else None

    @cached_property
    def module(self) -> torch.nn.Module:
        """The student itself, which `encode` does not need."""
        return load_student(self._folder).to(self.device)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return sentence vectors, float32 [n, D]."""
        return np.asarray(self._encoder.encode(texts, replace=self.spec.replace, temperature=self.spec.temperature))

    def _encodings(self, texts: Sequence[str]) -> list[Encoding]:
        return [self._tokenizer.encoding(text, self.prompt) for text in texts]

    @torch.no_grad()
    def _embed(self, batch: Batch) -> Sequence[Tensor]:
        ids, mask = (torch.from_numpy(array).to(self.device) for array in (batch.ids, batch.mask))
        return list(self.module(ids.long(), mask))

    def files(self) -> list[Path]:
        """Return weights, tokenizer and config."""
        return StudentFiles(self._folder).model_files()


class SentenceModel:
    """Any sentence-transformers model; code shipped with a model is never run."""

    def __init__(self, spec: Spec, device: str) -> None:
        from sentence_transformers import SentenceTransformer  # optional

        options = {"device": device, "revision": spec.revision, "model_kwargs": {"use_safetensors": True}}
        try:
            self.model = SentenceTransformer(spec.source, trust_remote_code=False, **options)
        except MemoryError:
            raise
        except Exception as error:
            raise InputError(
                f"cannot load {spec.source!r} with sentence-transformers: {first_line(error)}; safetensors weights are needed, "
                "and code that comes with a model is never run"
            ) from error
        self.spec = spec

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return sentence vectors, float32 [n, D]."""
        return np.asarray(self.model.encode(list(texts), show_progress_bar=False), np.float32)

    def encode_query(self, texts: Sequence[str]) -> np.ndarray:
        """Return vectors of queries, float32 [n, D], with the model's prompt for them."""
        return np.asarray(self.model.encode_query(list(texts), show_progress_bar=False), np.float32)

    def encode_document(self, texts: Sequence[str]) -> np.ndarray:
        """Return vectors of documents, float32 [n, D], with the model's prompt for them."""
        return np.asarray(self.model.encode_document(list(texts), show_progress_bar=False), np.float32)

    def parameters(self) -> int:
        """Return the number of weights."""
        return sum(p.numel() for p in self.model.parameters())

    def files(self) -> list[Path]:
        """Return the files of a local folder; none for a Hub model, whose cache consists of links."""
        folder = Path(self.spec.source)
        return [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
