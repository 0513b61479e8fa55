"""How a student is moved: AdamW with gradients averaged by DDP, or by DeepSpeed's ZeRO; and how each writes where it stands.

Comes in: a student on its device, and losses. Goes out: a student one step further, and a checkpoint folder. That of AdamW
holds tensors only; DeepSpeed's is pickled by DeepSpeed, so it is read from the run's own folder and from nowhere else.
Holds the student four times over; ZeRO shares AdamW's half of it among the workers.
"""

import ctypes
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from msense import storage
from msense.errors import BadInput, MsenseError
from msense.student import Student
from msense.text import first_line

_TRIM_THRESHOLD, _MMAP_MAX, _NEVER = -1, -4, (1 << 31) - 1  # of glibc's mallopt
TENSORS, ZERO = "tensors.safetensors", "zero"  # of a checkpoint
HASH = "tensors.sha256"  # of that file: a bit that flipped in a number is noticed by nothing else
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


class Engine(Protocol):
    """What takes steps.

    Attributes:
        student: the student itself, for what needs no gradient.
        model: what is called in training.
        every_rank: whether each worker writes a part of a checkpoint.
    """

    student: Student
    model: nn.Module
    every_rank: bool

    def slice_of_step(self, last: bool) -> AbstractContextManager[Any]:
        """Surround forward and backward of a slice of a step."""

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients up."""

    def step(self, lr: float) -> None:
        """Take a step with the gradients of all slices, and forget them.

        Raises:
            MsenseError: a gradient is not finite.
        """

    def whole(self) -> AbstractContextManager[Any]:
        """Surround what reads the student's weights; all workers must take part."""

    def save(self, folder: Path) -> None:
        """Write weights and optimizer."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            BadInput: it is damaged, or of another student.
        """


def parameter_groups(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's: biases, norms and a transformer's embeddings are not decayed, a static student's shift is."""
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in ((n, p) for n, p in student.named_parameters() if p.requires_grad):
        parts[parameter.ndim == 2 and "embedding" not in name].append(parameter)
    return [{"params": found, "weight_decay": weight_decay * decayed} for decayed, found in parts.items()]


class Plain:
    """AdamW; the model may be wrapped for DDP."""

    every_rank = False

    def __init__(
        self,
        student: nn.Module,
        weight_decay: float,
        clip: float,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        self.student: Any = student
        self.model = wrap(student) if wrap else student
        self.clip = clip
        self.optimizer = torch.optim.AdamW(parameter_groups(student, weight_decay), fused=True)

    def slice_of_step(self, last: bool) -> AbstractContextManager[Any]:
        """Leave gradients of all but the last slice where they are."""
        held: AbstractContextManager[Any] = nullcontext() if last else getattr(self.model, "no_sync", nullcontext)()
        return held

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients up."""
        torch.autograd.backward(loss)

    def step(self, lr: float) -> None:
        """Clip, and take a step."""
        if self.clip:
            norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.clip, foreach=True)
            _check_norm(float(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def whole(self) -> AbstractContextManager[Any]:
        """Do nothing: every worker has all weights."""
        return nullcontext()

    def save(self, folder: Path) -> None:
        """Write one file of tensors, without those that no step moves."""
        still = _still(self.student)
        tensors = {f"student.{name}": value for name, value in self.student.state_dict().items() if name not in still}
        for number, of in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{number}.{name}": value for name, value in of.items()}
        save_file({name: value.detach().cpu().clone() for name, value in tensors.items()}, folder / TENSORS)
        (folder / HASH).write_text(storage.sha256_of(folder / TENSORS), encoding="ascii")

    def load(self, folder: Path) -> None:
        """Read that file."""
        try:
            if storage.sha256_of(folder / TENSORS) != (folder / HASH).read_text(encoding="ascii"):
                raise ValueError(f"{TENSORS} does not hold the bytes that were written")
            student = _still(self.student)
            found: dict[int, dict[str, Tensor]] = {}
            for name, value in load_file(folder / TENSORS).items():
                owner, _, key = name.partition(".")
                (student if owner == "student" else found.setdefault(int(owner), {}))[key] = value
            self.student.load_state_dict(student)
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": found, "param_groups": groups})
        except _DAMAGE as error:
            raise damaged(folder, error) from error


class Zero:
    """DeepSpeed's engine; stage 1 shares the optimizer's state among workers, 2 also gradients, 3 also weights."""

    every_rank = True

    def __init__(self, student: Student, weight_decay: float, clip: float, stage: int, device: str) -> None:
        """Wrap a student; torch's process group must be there.

        Raises:
            MsenseError: this DeepSpeed does not take it.
        """
        os.environ.setdefault("DS_ACCELERATOR", device)  # read once, when DeepSpeed is first imported in this process
        os.environ["LOCAL_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", "1")  # workers of this node
        import deepspeed

        self.stage, self.clip = stage, clip
        config = {
            "train_micro_batch_size_per_gpu": 1,  # losses are sums over batches of any size: see `losses.weighted`
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip,
            "zero_optimization": {"stage": stage, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 60,
        }
        optimizer = torch.optim.AdamW(parameter_groups(student, weight_decay))
        self.student = student
        self.model, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=config)

    def slice_of_step(self, last: bool) -> AbstractContextManager[Any]:
        """Tell DeepSpeed whether gradients are whole."""
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients up."""
        self.model.backward(loss)

    def step(self, lr: float) -> None:
        """Clip, and take a step."""
        for group in self.model.optimizer.param_groups:
            group["lr"] = lr
        self.model.step()
        norm = self.model.get_global_grad_norm()
        if self.clip and norm is not None:
            _check_norm(float(norm))

    def whole(self) -> AbstractContextManager[Any]:
        """Bring the weights together that stage 3 keeps apart."""
        if self.stage < 3:
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(self.student.parameters()))
        return gathered

    def save(self, folder: Path) -> None:
        """Write this worker's part."""
        self.model.save_checkpoint(str(folder), tag=ZERO)

    def load(self, folder: Path) -> None:
        """Read the parts of all workers: as many as wrote them."""
        try:
            found, _ = self.model.load_checkpoint(str(folder), tag=ZERO)
        except (*_DAMAGE, AssertionError) as error:
            raise damaged(folder, error) from error
        if found is None:
            raise damaged(folder, FileNotFoundError(f"it has no {ZERO}/"))


def _still(student: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are not trained, by name."""
    return {name: parameter.detach() for name, parameter in student.named_parameters() if not parameter.requires_grad}


def keep_freed_memory() -> None:
    """Have this process keep what a step frees, as the next one needs it again (glibc; a fifth of a step on a CPU).

    Else large tensors are given back to the system, and every page of the next ones is cleared anew.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)


def damaged(folder: Path, error: BaseException) -> BadInput:
    """Say that a checkpoint cannot be read."""
    return BadInput(
        f"the checkpoint {folder} is damaged ({first_line(error)}): delete {folder.parent}, and the same command trains "
        "from the beginning"
    )


def _check_norm(norm: float) -> None:
    if not math.isfinite(norm):
        raise MsenseError("a gradient is not finite: give a smaller --lr, or train in float32")
