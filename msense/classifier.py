"""A classifier on token embeddings: the teacher's pooling, a pooler, a linear layer; and how it lies in the teacher's folder.

Comes in: embeddings of a teacher, or senses or a student's in their place. Goes out: a score a label, or a number. On disk it is
`classifier/` in the teacher's folder: config.json and classifier.safetensors, of which nothing is trusted. Holds its weights.
"""

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from msense.artefact import Artefact, FrozenModel, shown
from msense.config import MAX_DIM
from msense.dictionary.format import atomic_path
from msense.errors import BadInput
from msense.pooling import pool, pool_rows
from msense.student.config import Pooling

FOLDER, CONFIG, WEIGHTS = "classifier", "config.json", "classifier.safetensors"
CLASSIFIER = Artefact("classifier", "copy or train it again", BadInput)
MAX_LABELS, LONGEST_LABEL = 1 << 12, 4096

_Label = Annotated[str, Field(max_length=LONGEST_LABEL)]


class ClassifierConfig(FrozenModel):
    """What a classifier is."""

    format_version: Literal[1] = 1
    task: Annotated[str, Field(max_length=4096)]
    dim: int = Field(gt=0, le=MAX_DIM)
    pooling: Pooling
    labels: tuple[_Label, ...] | None = Field(
        min_length=2, max_length=MAX_LABELS, description="none: a number is predicted"
    )
    joiner: Annotated[str, Field(max_length=64)] = Field(default="", description="between the texts of a pair")

    @field_validator("labels")
    @classmethod
    def _once(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("a label is there twice")
        return value


class Classifier(nn.Module):
    """Pool, dense, tanh, linear: the paper's pooler and classifier, on the teacher's own pooling.

    Attributes:
        config: what it is.
    """

    def __init__(self, config: ClassifierConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, 1 if config.labels is None else len(config.labels))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return scores [B, labels] (of a regression [B, 1]) of embeddings [B, L, D] where the mask [B, L] is true."""
        return self._scores(pool(hidden, mask, self.config.pooling, normalize=False))

    def of_rows(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Return the same of embeddings [N, D] without padding, of passages of `lengths` int64 [P]."""
        return self._scores(pool_rows(hidden, lengths, self.config.pooling, normalize=False))

    def _scores(self, vectors: Tensor) -> Tensor:
        found: Tensor = self.out(self.dropout(torch.tanh(self.dense(self.dropout(vectors)))))
        return found


def save_classifier(folder: str | Path, classifier: Classifier) -> None:
    """Write a classifier into a teacher's folder; its config last."""
    inner = Path(folder, FOLDER)
    inner.mkdir(parents=True, exist_ok=True)
    (inner / CONFIG).unlink(missing_ok=True)
    with atomic_path(inner / WEIGHTS) as scratch:
        save_file({name: t.detach().cpu().float().contiguous() for name, t in classifier.state_dict().items()}, scratch)
    with atomic_path(inner / CONFIG) as scratch:
        scratch.write_text(classifier.config.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_classifier(folder: str | Path) -> Classifier:
    """Read the classifier of a teacher's folder, set to inference.

    Raises:
        BadInput: there is none, or a file is damaged, foreign, leads out of the folder or contradicts the other.
    """
    inner = Path(folder, FOLDER)
    if not inner.is_dir():
        raise BadInput(
            f"{folder} has no classifier: make a teacher with one by jobs/finetune.py, and give it as --teacher"
        )
    paths = [CLASSIFIER.inside(inner / name, Path(folder)) for name in (CONFIG, WEIGHTS)]
    config = CLASSIFIER.read_config(paths[0], ClassifierConfig)
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in Classifier(config).state_dict().items()}
    try:
        with safe_open(paths[1], framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            found = {name: tuple(part.get_shape()) for name, part in slices.items()}
            if found != wanted or {part.get_dtype() for part in slices.values()} != {"F32"}:
                raise BadInput(f"{paths[1]} does not fit {CONFIG}: its tensors are others; copy or train it again")
            weights = {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{paths[1]} is cut off or no safetensors file ({shown(error)}): copy it again") from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise BadInput(f"{paths[1]} holds NaN or infinite numbers: train it again")
    classifier = Classifier(config)
    classifier.load_state_dict(weights)
    return classifier.eval()
