"""A student as a module of sentence-transformers: `SentenceTransformer(folder, trust_remote_code=True)` makes one.

Comes in: a shipped student's folder or hub name, then texts. Goes out: sentence vectors and token embeddings. Its embeddings
are those of `SenseEncoder.encode`. Holds the student, and a static one once more as `StaticEncoder` while it infers on a
CPU; the dictionary is never read.
"""

from _collections_abc import dict_items, dict_keys, dict_values
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from msense.dictionary.format import atomic_path
from msense.errors import BadInput, StudentError
from msense.student.config import StudentFiles
from msense.student.files import inside, load_student, save_student
from msense.student.static import StaticBody
from msense.student.static_inference import StaticEncoder
from msense.student.student import Student
from msense.student.tokenizer import TextReader, padded


class SenseModule(InputModule):
    """A student and its tokenizer."""

    config_file_name = "config.json"

    def __init__(self, student: Student, reader: TextReader) -> None:
        super().__init__()
        self.student = student
        self._reader = reader
        self.tokenizer = reader.tokenizer
        self._max_length = student.config.max_length
        self._fast: tuple[tuple[object, ...], StaticEncoder] | None = None  # of the weights that the stamp tells

    @property
    def max_seq_length(self) -> int:
        """Tokens of a text that are read, special ones too.

        Raises:
            BadInput: when set to more than the student was shipped with, or to no more than the special tokens.
        """
        return self._max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        special = self.tokenizer.num_special_tokens_to_add(is_pair=False)
        if not special < value <= self.student.config.max_length:
            raise BadInput(
                f"max_seq_length is {value}, but must be from {special + 1} to {self.student.config.max_length}: beyond the "
                "special tokens, and no more than the student was shipped with"
            )
        self.tokenizer.enable_truncation(value)
        self._max_length = value

    def get_embedding_dimension(self) -> int:
        """Return the width D of the vectors."""
        return self.student.config.dim

    def preprocess(self, inputs: list[str], prompt: str | None = None, **_: Any) -> dict[str, Tensor]:  # noqa: ANN401 - the library's own
        """Return the token ids int64 [B, L] of texts, and their mask."""
        ids, mask = padded(self._reader.ids(inputs, prompt or ""))
        return {"input_ids": ids, "attention_mask": mask.long()}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:  # noqa: ANN401 - the library's own
        """Add the embeddings of tokens [B, L, D] and texts [B, D]; those of tokens when asked for, where that is faster."""
        ids, mask = features["input_ids"], features["attention_mask"].bool()
        if self._is_fast(ids):
            rows = [row[real] for row, real in zip(ids.numpy(), mask.numpy(), strict=True)]
            sentences = torch.from_numpy(self._static().sentences(rows))
            return _Lazy({**features, "sentence_embedding": sentences}, lambda: self.student(ids, mask).hidden)
        hidden = self.student(ids, mask).hidden
        return {
            **features,
            "token_embeddings": hidden,
            "sentence_embedding": self.student.sentence(hidden, mask),
        }

    def train(self, mode: bool = True) -> "SenseModule":
        """Set to training or inference; the tables for inference are dropped."""
        if mode:
            self._fast = None
        super().train(mode)
        return self

    def _is_fast(self, ids: Tensor) -> bool:
        """Tell whether nothing but the vectors of a static student in float32 on the CPU is wanted: no gradients."""
        body = self.student.body
        return (
            isinstance(body, StaticBody)
            and not self.training
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and all(tensor.device.type == "cpu" for tensor in (ids, body.means))
            and body.means.dtype == torch.float32
        )

    def _static(self) -> StaticEncoder:
        """Return the student made fast; made anew when weights have changed since."""
        tensors = self.student.state_dict(keep_vars=True).values()
        stamp = tuple((t.data_ptr(), None if t.is_inference() else t._version) for t in tensors)
        if self._fast is None or self._fast[0] != stamp:
            self._fast = stamp, StaticEncoder(self.student)
        return self._fast[1]

    def save(self, output_path: str, *_: Any, **__: Any) -> None:  # noqa: ANN401 - the library's own
        """Write student and tokenizer; sentence-transformers writes the rest."""
        files = StudentFiles(Path(output_path))
        config = self.student.config.model_copy(update={"max_length": self.max_seq_length})
        save_student(files.folder, self.student, config)
        self.tokenizer.no_truncation()
        with atomic_path(files.tokenizer) as scratch:
            scratch.write_text(self.tokenizer.to_str(), encoding="utf-8")
        self.tokenizer.enable_truncation(self.max_seq_length)

    @classmethod
    def load(cls, model_name_or_path: str, *, subfolder: str = "", **told: Any) -> "SenseModule":  # noqa: ANN401 - the library's own
        """Load a shipped student.

        Args:
            model_name_or_path: its folder, or a name on the hub.
            subfolder: where in it the student is.
            told: how to reach the hub, and what is for other modules.

        Raises:
            StudentError: a file is missing, truncated, foreign, leads out of the folder or contradicts another.
        """
        hub = {name: told.get(name) for name in ("token", "cache_folder", "revision")}
        own = StudentFiles(Path())
        paths = [
            cls.load_file_path(
                model_name_or_path,
                path.name,
                subfolder=subfolder,
                local_files_only=bool(told.get("local_files_only")),
                **hub,
            )
            for path in (own.config, own.weights, own.tokenizer)
        ]
        if paths[0] is None:
            raise StudentError(f"{model_name_or_path} has no config.json: it is no student; give another folder")
        files = StudentFiles(Path(paths[0]).parent)
        student = load_student(files.folder)
        return cls(student, TextReader(inside(files, files.tokenizer), student.config))


class _Lazy(dict[str, Any]):
    """Features whose token embeddings are computed when first asked for: few who want a text's vector want them."""

    def __init__(self, features: dict[str, Any], tokens: Callable[[], Tensor]) -> None:
        super().__init__(features)
        self._tokens = tokens

    def __missing__(self, name: str) -> Tensor:
        if name != "token_embeddings":
            raise KeyError(name)
        with torch.no_grad():
            self[name] = self._tokens()
        return self[name]

    def __contains__(self, name: object) -> bool:
        return name == "token_embeddings" or super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def get(self, name: str, default: Any = None) -> Any:  # noqa: ANN401 - as a dict has it
        """Return a feature."""
        known = name in self
        return self[name] if known else default

    def keys(self) -> "dict_keys[str, Any]":
        """Return the names of all."""
        self["token_embeddings"]
        return super().keys()

    def items(self) -> "dict_items[str, Any]":
        """Return all."""
        self["token_embeddings"]
        return super().items()

    def values(self) -> "dict_values[str, Any]":
        """Return all, without names."""
        self["token_embeddings"]
        return super().values()
