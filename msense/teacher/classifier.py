"""A classifier on token embeddings, stored in the teacher's folder as `classifier/` and validated on loading."""

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from msense.constants import MAX_DIM
from msense.errors import InputError
from msense.io.scratch import atomic_path
from msense.io.untrusted import Artefact, FrozenModel
from msense.teacher.pooling import Pooling, pool, pool_rows

FOLDER, CONFIG, WEIGHTS = "classifier", "config.json", "classifier.safetensors"
CLASSIFIER = Artefact("classifier", "copy or train it again", InputError)
MAX_LABELS, LONGEST_LABEL = 1 << 12, 4096
_Label = Annotated[str, Field(max_length=LONGEST_LABEL)]


class ClassifierConfig(FrozenModel):
    """The content of a classifier's config.json.

    Example:
        >>> ClassifierConfig(task="sst2", dim=384, pooling="mean", labels=("negative", "positive"))
    """

    format_version: Literal[1] = 1
    task: Annotated[str, Field(max_length=4096)]
    dim: int = Field(gt=0, le=MAX_DIM)
    pooling: Pooling
    labels: tuple[_Label, ...] | None = Field(min_length=2, max_length=MAX_LABELS, description="null: regression")
    joiner: Annotated[str, Field(max_length=64)] = Field(default="", description="separator of the texts of a pair")

    @field_validator("labels")
    @classmethod
    def _unique(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("contains a label twice")
        return value


class Classifier(nn.Module):
    """Pooling, dense, tanh, linear: the paper's pooler and classifier on the teacher's own pooling.

    Example:
        >>> classifier = Classifier(ClassifierConfig(task="t", dim=4, pooling="mean", labels=("no", "yes")))
        >>> classifier(torch.randn(3, 5, 4), torch.ones(3, 5, dtype=torch.bool)).shape
        torch.Size([3, 2])
    """

    def __init__(self, config: ClassifierConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, 1 if config.labels is None else len(config.labels))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return scores [B, labels] (regression: [B, 1]) of embeddings [B, L, D] where the mask [B, L] is true."""
        return self._scores(pool(hidden, mask, self.config.pooling, normalize=False))

    def of_rows(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Return scores of concatenated passages: embeddings [N, D] without padding, `lengths` int64 [P]."""
        return self._scores(pool_rows(hidden, lengths, self.config.pooling, normalize=False))

    def _scores(self, vectors: Tensor) -> Tensor:
        scores: Tensor = self.out(self.dropout(torch.tanh(self.dense(self.dropout(vectors)))))
        return scores


def save_classifier(folder: str | Path, classifier: Classifier) -> None:
    """Write a classifier into a teacher's folder; the config comes last, so that a partial write is detected."""
    inner = Path(folder, FOLDER)
    inner.mkdir(parents=True, exist_ok=True)
    (inner / CONFIG).unlink(missing_ok=True)
    with atomic_path(inner / WEIGHTS) as scratch:
        save_file({name: t.detach().cpu().float().contiguous() for name, t in classifier.state_dict().items()}, scratch)
    with atomic_path(inner / CONFIG) as scratch:
        scratch.write_text(classifier.config.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_classifier(folder: str | Path) -> Classifier:
    """Load the classifier of a teacher's folder in inference mode.

    Raises:
        InputError: there is none, or a file is corrupted, of another format, outside the folder or inconsistent.
    """
    inner = Path(folder, FOLDER)
    if not inner.is_dir():
        raise InputError(
            f"{folder} has no classifier: fine-tune a teacher with `msense finetune` and give its output as --teacher"
        )
    config_path, weights_path = (CLASSIFIER.inside(inner / name, Path(folder)) for name in (CONFIG, WEIGHTS))
    config = CLASSIFIER.read_config(config_path, ClassifierConfig)
    with torch.device("meta"):
        expected = {name: ("F32", tuple(t.shape)) for name, t in Classifier(config).state_dict().items()}
    if CLASSIFIER.header(weights_path)[0] != expected:  # checked before anything of that size is allocated
        raise InputError(f"{weights_path} does not match {CONFIG}: {CLASSIFIER.remedy}")
    weights = load_file(weights_path)
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise InputError(f"{weights_path} contains NaN or infinite values: train it again")
    classifier = Classifier(config)
    classifier.load_state_dict(weights)
    return classifier.eval()
