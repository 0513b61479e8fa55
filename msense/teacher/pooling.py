"""From token embeddings to one vector per passage: pooling, then a teacher's Dense modules; padding never counts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from msense.constants import MAX_DIM
from msense.errors import InputError
from msense.io.untrusted import Artefact, FrozenModel
from msense.teacher.files import locate, read_object, read_settings
from msense.teacher.spec import TeacherInfo

Pooling = Literal["mean", "cls", "lasttoken"]
POOLINGS = get_args(Pooling)
Activation = Literal[  # modules of torch without weights of their own
    "Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "CELU", "ELU", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU",
    "LogSigmoid", "Mish", "ReLU6", "SELU", "Softplus", "Softsign", "Tanhshrink",
]  # fmt: skip
_ACTIVATIONS: dict[str, type[nn.Module]] = {name: getattr(nn, name) for name in get_args(Activation)}
_PROJECTION = Artefact("teacher", "download it again", InputError)
_DENSE_INPUT = "sentence_embedding"


def check_pooling(how: str) -> None:
    """Raise `InputError` for a pooling that is not one of `POOLINGS`."""
    if how not in POOLINGS:
        raise InputError(f"unsupported teacher pooling {how!r} (supported: {', '.join(POOLINGS)}): give --no-pooled")


def pool(hidden: Tensor, mask: Tensor, how: str, *, normalize: bool, skip: int | Tensor = 0) -> Tensor:
    """Return the vector of every passage, differentiable.

    Args:
        hidden: floating point [B, L, D], arbitrary where the mask is false.
        mask: bool [B, L]. A passage without tokens to pool gives zeros.
        how: `mean` of all tokens including special ones, `cls` (first token) or `lasttoken`.
        normalize: scale vectors to unit length.
        skip: tokens at the start of every passage that do not count, such as a prompt's; int64 [B] if they differ.

    Returns:
        [B, D], float64 for float64 input, else float32.

    Raises:
        InputError: unsupported pooling.
    """
    check_pooling(how)
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    if isinstance(skip, Tensor) or skip:
        first = skip[:, None] if isinstance(skip, Tensor) else skip
        mask = mask & (mask.long().cumsum(1) > first)
    if how == "mean":
        vectors = hidden.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    else:
        length = mask.shape[1]  # never the length of a tensor, nor an index of rows: ONNX would store their sizes
        columns = torch.arange(length, device=mask.device)
        ends = columns.masked_fill(~mask, length).amin(1) if how == "cls" else (columns * mask).amax(1)
        places = ends.clamp(max=length - 1)[:, None, None].expand(-1, 1, hidden.shape[2])
        vectors = hidden.gather(1, places)[:, 0]
        vectors = vectors.masked_fill(~mask.any(1)[:, None], 0)
    return torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors


def pool_rows(embeddings: Tensor, lengths: Tensor, how: str, *, normalize: bool, skip: int = 0) -> Tensor:
    """Return the vector of every passage, float32 [P, D], like `pool`, from embeddings without padding.

    Args:
        embeddings: float32 [N, D], passages concatenated.
        lengths: int64 [P], tokens of each; one of at most `skip` gives zeros.
        how: see `pool`.
        normalize: scale vectors to unit length.
        skip: see `pool`.
    """
    check_pooling(how)
    ends, counts = lengths.cumsum(0), (lengths - skip).clamp(min=0)
    if how == "mean":
        rows = torch.arange(len(embeddings), device=embeddings.device)
        if skip:
            rows = rows[rows - (ends - lengths).repeat_interleave(lengths) >= skip]
        vectors = torch.nn.functional.embedding_bag(rows, embeddings, counts.cumsum(0) - counts, mode="mean")
    else:
        vectors = embeddings.new_zeros(len(lengths), embeddings.shape[1])
        vectors[counts > 0] = embeddings[(ends - counts if how == "cls" else ends - 1)[counts > 0]]
    return torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors


class ProjectionConfig(FrozenModel):
    """A Dense module of sentence-transformers: a linear layer and an activation, applied to sentence vectors."""

    in_features: int = Field(gt=0, le=MAX_DIM)
    out_features: int = Field(gt=0, le=MAX_DIM)
    bias: bool = True
    activation: Activation = "Tanh"
    residual: bool = False


class Projection(nn.Module):
    """A Dense module with random weights.

    Example:
        >>> Projection(ProjectionConfig(in_features=4, out_features=2))(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(self, config: ProjectionConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.in_features, config.out_features, bias=config.bias)
        self.activation = _ACTIVATIONS[config.activation]()
        if config.residual and config.in_features != config.out_features:
            self.residual = nn.Linear(config.in_features, config.out_features, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return projected vectors [B, out_features] of vectors [B, in_features]."""
        projected: Tensor = self.activation(self.linear(vectors))
        if self.config.residual:
            projected = projected + (self.residual(vectors) if hasattr(self, "residual") else vectors)
        return projected


class SentenceHead(nn.Module):
    """Sentence vectors as a teacher gives them: pooling, projections, normalization, truncation.

    Example:
        >>> head = SentenceHead("mean", normalize=True)
        >>> head(torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        pooling: str,
        *,
        normalize: bool,
        skip: int = 0,
        projections: Sequence[Projection] = (),
        truncate_dim: int | None = None,
    ) -> None:
        """See `pool` for pooling, normalize and skip; vectors are cut to their first `truncate_dim` numbers."""
        super().__init__()
        self.pooling, self.normalize, self.skip, self.truncate_dim = pooling, normalize, skip, truncate_dim
        self.projections = nn.ModuleList(projections)

    def forward(self, hidden: Tensor, mask: Tensor, skip: int | Tensor | None = None) -> Tensor:
        """Return vectors [B, D'] of embeddings [B, L, D] where the mask, bool [B, L], is true; `skip` replaces its own."""
        skip = self.skip if skip is None else skip
        return self.finish(pool(hidden, mask, self.pooling, normalize=False, skip=skip))

    def of_rows(self, embeddings: Tensor, lengths: Tensor, skip: int | None = None) -> Tensor:
        """Return vectors, float32 [P, D'], of embeddings [N, D] of passages with these lengths, int64 [P]."""
        skip = self.skip if skip is None else skip
        return self.finish(pool_rows(embeddings, lengths, self.pooling, normalize=False, skip=skip))

    def finish(self, vectors: Tensor) -> Tensor:
        """Return what follows pooling, [B, D'], of pooled vectors [B, D]."""
        for projection in self.projections:
            vectors = projection(vectors)
        vectors = nn.functional.normalize(vectors, dim=1) if self.normalize else vectors
        return vectors[:, : self.truncate_dim]


def sentence_dim(width: int, projections: Sequence[ProjectionConfig], truncate_dim: int | None) -> int:
    """Return the size D' of the sentence vectors of token embeddings of `width` numbers."""
    width = projections[-1].out_features if projections else width
    return min(width, truncate_dim or width)


def load_head(name: str, info: TeacherInfo) -> SentenceHead:
    """Load what turns the token embeddings of a teacher, by name or folder, into its sentence vectors."""
    own = read_settings(locate(name, info.revision))
    return SentenceHead(
        info.pooling,
        normalize=info.normalize,
        skip=info.skip,
        projections=load_projections(own.projections, info.dim),
        truncate_dim=info.truncate_dim,
    )


def load_projections(folders: Sequence[Path], width: int) -> list[Projection]:
    """Load the Dense modules of a teacher whose token embeddings have `width` numbers.

    Raises:
        InputError: a module is corrupted, unsupported, or does not fit the one before it.
    """
    projections = []
    for folder in folders:
        projection = _load_projection(folder)
        if projection.config.in_features != width:
            raise InputError(f"{folder} projects vectors of {projection.config.in_features} numbers, not {width}")
        width = projection.config.out_features
        projections.append(projection)
    return projections


def _load_projection(folder: Path) -> Projection:
    given = read_object(folder / "config.json")
    name = str(given.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = name.rpartition(".")[2]
    if activation not in _ACTIVATIONS or not name.startswith("torch.nn."):
        raise InputError(f"{folder} has the activation {name}, which is not supported: use another teacher")
    if any(given.get(f"module_{kind}_name") not in (None, _DENSE_INPUT) for kind in ("input", "output")):
        raise InputError(
            f"{folder} projects other values than sentence vectors, which is not supported: use another teacher"
        )
    values = {"in_features": given.get("in_features"), "out_features": given.get("out_features")}
    values |= {"bias": given.get("bias", True), "residual": given.get("use_residual", False), "activation": activation}
    try:
        config = ProjectionConfig(**values)
    except ValueError as error:
        raise InputError(
            f"{folder / 'config.json'} is not that of a Dense module: download the teacher again"
        ) from error
    with torch.device("meta"):
        expected = {key: tuple(tensor.shape) for key, tensor in Projection(config).state_dict().items()}
    path = folder / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{path} is missing, the only format that is read: save the teacher with safetensors")
    if {key: shape for key, (_, shape) in _PROJECTION.header(path)[0].items()} != expected:
        raise InputError(f"{path} does not match its config.json: download the teacher again")
    projection = Projection(config).float()  # whatever torch's default dtype is
    projection.load_state_dict({key: tensor.float() for key, tensor in load_file(path).items()})
    return projection.eval().requires_grad_(requires_grad=False)
