"""Models that are compared: the teacher, as it is, replaced or truncated; students; any sentence-transformers model; model2vec.

Comes in: a `Spec`, what one `--model` says, and texts. Goes out: sentence vectors, and of those that read token by token also
token embeddings. Holds one model, and the embeddings of the texts that are asked for at once.
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

from msense import storage
from msense.config import BuildConfig
from msense.dictionary import SenseDictionary
from msense.encoder import SenseEncoder
from msense.errors import BadInput
from msense.evaluation import model2vec_peer
from msense.evaluation.spec import Spec
from msense.hub import student_folder
from msense.pooling import pool_rows
from msense.student import load_student
from msense.student.config import StudentFiles
from msense.student.tokenizer import TextReader, padded
from msense.teacher import TOKEN_BUDGET, Teacher, describe, pad_batch, resolve_dtype, token_batches
from msense.teacher_folder import body_folder, loading

SLAB = 512  # texts whose token embeddings are held at once


@dataclass(frozen=True)
class Read:
    """Some texts token by token: P texts, N tokens, special ones too.

    Attributes:
        ids: int64 [N].
        offsets: int64 [P + 1], first token of each text.
        spans: int64 [N, 2], characters of each token in its text; two zeros for one that stands for none.
        hidden: float32 [N, D], of which the sentence vector is made: replaced where the model replaces.
        senses: float32 [N, D], compared with the senses of each token: never replaced. May be the same array.
    """

    ids: np.ndarray
    offsets: np.ndarray
    spans: np.ndarray
    hidden: np.ndarray
    senses: np.ndarray


class Model(Protocol):
    """Anything that makes vectors of texts."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return sentence vectors, float32 [n, D]."""

    def parameters(self) -> int:
        """Return the number of weights, those of a dictionary left out."""

    def files(self) -> list[Path]:
        """Return the files that it takes to use the model, those of a dictionary left out."""


@contextmanager
def opened(spec: Spec, device: str, threads: int) -> Iterator[Any]:
    """Give a model as `make_model` does, and end whatever process it has."""
    model = make_model(spec, device, threads)
    try:
        yield model
    finally:
        if isinstance(model, Model2Vec):
            model.close()


class TokenModel(Model, Protocol):
    """A model that speaks of tokens; its dictionary, if it has one, says which senses they have."""

    spec: Spec

    @property
    def dictionary(self) -> SenseDictionary | None:
        """The senses that it speaks in."""

    def read(self, texts: Sequence[str]) -> Read:
        """Return the embeddings of all tokens: memory 8·N·D bytes."""

    def tokens(self, texts: Sequence[str]) -> int:
        """Return how many tokens the texts have."""


def make_model(spec: Spec, device: str, threads: int) -> Model:
    """Load a model.

    Args:
        spec: what one `--model` says.
        device: cuda or cpu.
        threads: of torch.

    Raises:
        BadInput: it cannot be had, or dictionary and teacher do not belong together.
    """
    torch.set_num_threads(threads)
    if spec.kind == "student":
        return StudentModel(spec, device)
    if spec.kind in ("teacher", "replaced", "truncated"):
        return TeacherModel(spec, device, threads)
    if spec.kind == "model2vec":
        return Model2Vec(spec, threads)
    return SentenceModel(spec, device)


def slabs(texts: Sequence[str], size: int = SLAB) -> Iterator[Sequence[str]]:
    """Cut texts into so many at a time."""
    yield from (texts[start : start + size] for start in range(0, len(texts), size))


def folder_of_student(source: str) -> Path:
    """Return the local folder of a student: a folder or URI, the run folder it is in, or fetched from the hub.

    Raises:
        StudentError: it cannot be had.
    """
    inside = storage.join(source, "student")
    source = inside if storage.exists(storage.join(inside, "config.json")) else source
    return student_folder(source)


class TeacherModel:
    """The teacher; or with every embedding replaced by senses of a dictionary; or only its first layers."""

    def __init__(self, spec: Spec, device: str, threads: int, like: SenseDictionary | None = None) -> None:
        """Load a teacher; it reads as that of its own dictionary did, or as that of the one it is to be `like`."""
        self.spec = spec
        self.dictionary = SenseDictionary.load(spec.source) if spec.kind == "replaced" else None
        told: dict[str, Any] = {"revision": spec.revision}
        if (given := self.dictionary or like) is not None:
            own = given.config
            told |= {"layer": own.layer, "prompt": own.prompt, "max_length": own.max_length or None}
        self.info, self.tokenizer = describe(spec.teacher, BuildConfig(**told))
        if self.dictionary is not None:
            config = self.dictionary.config
            if config.teacher.fingerprint not in ("", self.info.fingerprint):
                raise BadInput(
                    f"{spec.name}: teacher {self.info.name!r} is not the dictionary's, {config.teacher.name!r}: its weights "
                    "differ; say with --teacher where that one is"
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
        """Return sentence vectors, float32 [n, D], pooled as the teacher does."""
        found = [np.empty((0, self.info.dim), np.float32)]
        for slab in slabs(texts):
            read = self._read(slab)
            lengths = torch.from_numpy(np.diff(read.offsets))
            vectors = pool_rows(
                torch.from_numpy(read.hidden), lengths, self.info.pooling, normalize=self.info.normalize
            )
            found.append(vectors.numpy())
        return np.concatenate(found)

    def read(self, texts: Sequence[str]) -> Read:
        """Return the embeddings of all tokens."""
        return self._read(texts)

    def tokens(self, texts: Sequence[str]) -> int:
        """Return how many tokens the texts have."""
        return sum(len(encoding.ids) for encoding in self._encoded(texts))

    def parameters(self) -> int:
        """Return the number of weights."""
        return sum(p.numel() for p in self._teacher.engine.module.parameters())

    def files(self) -> list[Path]:
        """Return weights and tokenizer."""
        folder = body_folder(self.spec.teacher, self.spec.revision)
        return [*folder.glob("*.safetensors"), folder / "config.json", *folder.glob("tokenizer.json")]

    def _encoded(self, texts: Sequence[str]) -> list[Encoding]:
        prompt = self.info.prompt
        return self.tokenizer.encode_batch([prompt + text for text in texts] if prompt else list(texts))

    def _read(self, texts: Sequence[str]) -> Read:
        encodings = self._encoded(texts)
        rows = [np.array(encoding.ids, np.int64) for encoding in encodings]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        hidden = np.empty((offsets[-1], self.info.dim), np.float32)
        for batch in token_batches(np.maximum(np.diff(offsets), 1), self._budget):
            ids, mask = pad_batch([rows[i] for i in batch])
            if mask.any():
                own = self._teacher.embed(ids, mask).float().cpu().numpy()
                hidden[np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in batch])] = own[mask]
        every, plain = np.concatenate([*rows, np.empty(0, np.int64)]), hidden
        if self.dictionary is not None:
            soft = self.spec.temperature if self.spec.replace == "soft" else None
            hidden = self.dictionary.replace(every, plain, soft, metric=self.spec.metric)
        return Read(every, offsets, _spans(encodings, len(self.info.prompt)), hidden, plain)


class StudentModel:
    """A student, as it is or with every token replaced by a sense."""

    def __init__(self, spec: Spec, device: str) -> None:
        self.spec = spec
        self._folder = folder_of_student(spec.source)
        self._encoder = SenseEncoder.from_pretrained(self._folder, device=device)
        config = self._encoder.config
        self._reader = TextReader(StudentFiles(self._folder).tokenizer, config)
        self._budget = TOKEN_BUDGET[device]

    @cached_property
    def dictionary(self) -> SenseDictionary | None:
        """The senses that the student speaks in, if it was shipped with them."""
        return self._encoder.dictionary if StudentFiles(self._folder).dictionary.is_dir() else None

    @cached_property
    def _student(self) -> torch.nn.Module:
        return load_student(self._folder).to(self._encoder.device)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return sentence vectors, float32 [n, D]."""
        return np.asarray(self._encoder.encode(texts, replace=self.spec.replace, temperature=self.spec.temperature))

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Read:
        """Return the embeddings of all tokens, of both outputs; hidden is replaced where the spec says so."""
        prompt = self._encoder.config.prompt
        encodings = [self._reader.encoding(text, prompt) for text in texts]
        rows = [np.array(encoding.ids, np.int64) for encoding in encodings]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        hidden = np.empty((offsets[-1], self._encoder.config.dim), np.float32)
        senses = np.empty_like(hidden)
        for batch in token_batches(np.maximum(np.diff(offsets), 1), self._budget):
            ids, mask = (tensor.to(self._encoder.device) for tensor in padded([rows[i] for i in batch]))
            output = self._student(ids, mask)
            places = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in batch])
            hidden[places] = output.hidden[mask].float().cpu().numpy()
            senses[places] = output.senses[mask].float().cpu().numpy()
        every = np.concatenate([*rows, np.empty(0, np.int64)])
        if self.spec.replace is not None:
            soft = self.spec.temperature if self.spec.replace == "soft" else None
            hidden = self._encoder.dictionary.replace(every, senses, soft, metric=self.spec.metric)
        return Read(every, offsets, _spans(encodings, len(prompt)), hidden, senses)

    def tokens(self, texts: Sequence[str]) -> int:
        """Return how many tokens the texts have."""
        return sum(map(len, self._reader.ids(texts, self._encoder.config.prompt)))

    def parameters(self) -> int:
        """Return the number of weights."""
        return sum(p.numel() for p in self._student.parameters())

    def files(self) -> list[Path]:
        """Return weights, tokenizer and config."""
        files = StudentFiles(self._folder)
        return [files.weights, files.tokenizer, files.config]


class SentenceModel:
    """Any model that sentence-transformers loads, without running code that it brings along."""

    def __init__(self, spec: Spec, device: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise BadInput(
                f"{spec.name} is a model of sentence-transformers, which is not installed: pip install msense[evaluation]"
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
        """Return the files of its folder; none for a model of the hub, whose cache holds links."""
        folder = Path(self.spec.source)
        return [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []


class Model2Vec:
    """model2vec, distilled on the spot from the teacher in a Python that has it."""

    def __init__(self, spec: Spec, threads: int) -> None:
        self._peer = model2vec_peer.Peer(spec.python, body_folder(spec.teacher, spec.revision), threads)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return sentence vectors, float32 [n, D]."""
        return self._peer.encode(texts)

    def parameters(self) -> int:
        """Return the number of weights."""
        return self._peer.parameters

    def files(self) -> list[Path]:
        """Return weights, tokenizer and config."""
        return self._peer.files

    @property
    def seconds(self) -> float:
        """What its last encoding took, by its own clock."""
        return self._peer.seconds

    @property
    def peak_memory(self) -> int:
        """The most bytes that its process held."""
        return self._peer.peak_memory

    def close(self) -> None:
        """End its process."""
        self._peer.close()


def _spans(encodings: Sequence[Encoding], prompt: int) -> np.ndarray:
    """Return the characters of each token in its text; those of special tokens and of the prompt are (0, 0)."""
    found = np.array([span for encoding in encodings for span in encoding.offsets], np.int64).reshape(-1, 2)
    return np.maximum(found - prompt, 0)
