"""A student as a sentence-transformers module: `SentenceTransformer(folder, trust_remote_code=True)`.

Its embeddings equal those of `SenseEncoder.encode`; the dictionary is only read to save it again. For CPU inference a
static student is held twice, once as `StaticEncoder`.
"""

import logging
import shutil
from collections import UserDict
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from msense.dictionary import SenseDictionary
from msense.errors import InputError, StudentError
from msense.io.scratch import atomic_path
from msense.student.files import checked_path, load_student, save_student
from msense.student.layout import StudentFiles
from msense.student.static import TokenTable
from msense.student.static_inference import StaticEncoder
from msense.student.student import Student
from msense.student.tokenizer import StudentTokenizer, pad_ids

logger = logging.getLogger(__name__)


class SenseModule(InputModule):
    """A student and its tokenizer.

    Example:
        >>> model = SentenceTransformer("runs/student/student", trust_remote_code=True)  # doctest: +SKIP
        >>> model.encode(["a river bank", "a bank account"]).shape  # doctest: +SKIP
        (2, 384)
    """

    config_file_name = "config.json"

    def __init__(self, student: Student, reader: StudentTokenizer, dictionary: Path | None = None) -> None:
        """Use a student, its tokenizer, and the folder of its dictionary, which is only copied when it is saved."""
        super().__init__()
        self._dictionary = dictionary
        self.student = student
        self._reader = reader
        self.tokenizer = reader.tokenizer
        self._max_length = student.config.max_length
        self._fast: tuple[tuple[object, ...], StaticEncoder] | None = None  # with the version of its weights

    @property
    def max_seq_length(self) -> int:
        """Maximum tokens per text, special tokens included; InputError for a value without room for text or too large."""
        return self._max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        special = self.tokenizer.num_special_tokens_to_add(is_pair=False)
        if not special < value <= self.student.config.max_length:
            raise InputError(f"invalid max_seq_length {value}: use {special + 1} to {self.student.config.max_length}")
        self._reader.truncate(value)
        self._max_length = value

    def get_embedding_dimension(self) -> int:
        """Return the dimension D' of the vectors."""
        return self.student.config.sentence_dim

    def preprocess(self, inputs: list[str], prompt: str | None = None, **_: Any) -> dict[str, Tensor]:
        """Return the token ids int64 [B, L] of texts, and their mask."""
        ids, mask = pad_ids(self._reader.ids(inputs, prompt or ""))
        skip = self.student.config.skipped(self.tokenizer, prompt or "")
        return {"input_ids": ids, "attention_mask": mask.long(), "prompt_length": skip}

    def forward(self, features: dict[str, Any], **_: Any) -> MutableMapping[str, Any]:
        """Add token embeddings [B, L, D], lazily in the fast path, and sentence vectors [B, D]."""
        ids, mask = features["input_ids"], features["attention_mask"].bool()
        skip = int(features.get("prompt_length", 0))
        if (fast := self._fast_encoder(ids)) is not None:
            rows = [row[real] for row, real in zip(ids.numpy(), mask.numpy(), strict=True)]
            sentences = torch.from_numpy(fast.sentences(rows, skip))
            lazy = {"token_embeddings": lambda: self.student(ids, mask).hidden, "sentence_embedding": sentences}
            return _LazyFeatures({**features, **lazy})
        hidden = self.student(ids, mask).hidden
        sentences = self.student.sentence(hidden, mask, skip)
        return {**features, "token_embeddings": hidden, "sentence_embedding": sentences}

    def _fast_encoder(self, ids: Tensor) -> StaticEncoder | None:
        """Return inference tables, rebuilt if a weight has changed, for a static student in float32 on the CPU."""
        body = self.student.body
        static = isinstance(body, TokenTable) and body.means.dtype == torch.float32
        on_cpu = ids.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if self.training or torch.is_grad_enabled() or not (static and on_cpu):
            self._fast = None  # frees the tables
            return None
        tensors = self.student.state_dict(keep_vars=True).values()
        version = tuple((t.data_ptr(), None if t.is_inference() else t._version) for t in tensors)
        if self._fast is None or self._fast[0] != version:
            self._fast = version, StaticEncoder(self.student)
        return self._fast[1]

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write student, tokenizer and dictionary; sentence-transformers writes the rest."""
        files = StudentFiles(Path(output_path), portable=False)
        if self._dictionary is not None and self._dictionary.is_dir():
            SenseDictionary.load(self._dictionary).save(files.dictionary)
        else:
            shutil.rmtree(files.dictionary, ignore_errors=True)  # of another student
            logger.warning(
                "%s is saved without the senses of its tokens, which are not at %s: load the whole student to keep them",
                output_path,
                self._dictionary,
            )
        files.folder.mkdir(parents=True, exist_ok=True)
        files.config.unlink(missing_ok=True)
        self.tokenizer.no_truncation()
        with atomic_path(files.tokenizer) as scratch:
            scratch.write_text(self.tokenizer.to_str(), encoding="utf-8")
        self._reader.truncate(self.max_seq_length)
        config = self.student.config.model_copy(update={"max_length": self.max_seq_length})
        save_student(files.folder, self.student, config)

    @classmethod
    def load(cls, model_name_or_path: str, *, subfolder: str = "", **kwargs: Any) -> "SenseModule":
        """Load a student from a folder or the hub, with checks as `load_student`; only options of the hub are used."""
        options = {name: kwargs.get(name) for name in ("token", "cache_folder", "revision")}
        options |= {"subfolder": subfolder, "local_files_only": bool(kwargs.get("local_files_only"))}
        names = ("config.json", "model.safetensors", "tokenizer.json")
        config, *_ = [cls.load_file_path(model_name_or_path, name, **options) for name in names]
        if config is None:
            raise StudentError(f"{model_name_or_path} has no config.json: give the folder or hub name of a student")
        files = StudentFiles(Path(config).parent, portable=False)
        student = load_student(files.folder)
        return cls(student, StudentTokenizer(checked_path(files, files.tokenizer), student.config), files.dictionary)


class _LazyFeatures(UserDict[str, Any]):
    """Features in which a callable value is computed on first access; a caller may want sentence vectors only."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if callable(value):
            with torch.no_grad():
                value = self[name] = value()
        return value
