"""A student as a module of sentence-transformers: `SentenceTransformer(folder, trust_remote_code=True)` makes one.

Comes in: a shipped student's folder or hub name, then texts. Goes out: sentence vectors and token embeddings. Its embeddings
are those of `SenseEncoder.encode`. Holds the student; the dictionary is never read.
"""

from pathlib import Path
from typing import Any

from sentence_transformers.base.modules import InputModule
from torch import Tensor

from msense.dictionary.format import atomic_path
from msense.errors import StudentError
from msense.student.config import StudentFiles
from msense.student.files import inside, load_student, save_student
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

    @property
    def max_seq_length(self) -> int:
        """Tokens of a text that are read."""
        return self.student.config.max_length

    def get_embedding_dimension(self) -> int:
        """Return the width D of the vectors."""
        return self.student.config.dim

    def preprocess(self, inputs: list[str], prompt: str | None = None, **_: Any) -> dict[str, Tensor]:  # noqa: ANN401 - the library's own
        """Return the token ids int64 [B, L] of texts, and their mask."""
        ids, mask = padded(self._reader.ids(inputs, prompt or ""))
        return {"input_ids": ids, "attention_mask": mask.long()}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:  # noqa: ANN401 - the library's own
        """Add the embeddings of tokens [B, L, D] and texts [B, D]."""
        mask = features["attention_mask"].bool()
        hidden = self.student(features["input_ids"], mask).hidden
        return {
            **features,
            "token_embeddings": hidden,
            "sentence_embedding": self.student.sentence(hidden, mask),
        }

    def save(self, output_path: str, *_: Any, **__: Any) -> None:  # noqa: ANN401 - the library's own
        """Write student and tokenizer; sentence-transformers writes the rest."""
        files = StudentFiles(Path(output_path))
        save_student(files.folder, self.student)
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
