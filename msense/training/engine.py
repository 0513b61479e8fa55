"""Optimization engines: AdamW with optional DDP, and DeepSpeed ZeRO; both write and load checkpoints.

AdamW checkpoints hold tensors only; DeepSpeed pickles its own, so they are loaded from the run's own folder only.
Memory: four times the model; ZeRO shards the optimizer's half of it over the workers.
"""

import ctypes
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from msense.errors import InputError, MsenseError
from msense.io import storage
from msense.student import Student
from msense.text import first_line

_TRIM_THRESHOLD, _MMAP_MAX, _NEVER = -1, -4, (1 << 31) - 1  # of glibc's mallopt
TENSORS, ZERO = "tensors.safetensors", "zero"  # of a checkpoint
CHECKSUM_FILE = "tensors.sha256"  # checksum of TENSORS: safetensors does not detect flipped bits in values
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


def parameter_groups(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices and a static student's shift decay; biases, norms and embeddings do not."""
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in ((n, p) for n, p in student.named_parameters() if p.requires_grad):
        parts[parameter.ndim == 2 and "embedding" not in name].append(parameter)
    return [{"params": group, "weight_decay": weight_decay * decayed} for decayed, group in parts.items()]


class DDPEngine:
    """AdamW; `wrap` may add DDP, so that `model` is the wrapped `student`.

    The gradients of a student's separate senses are clipped by themselves, and do not count for the other parameters.

    Example:
        >>> engine = DDPEngine(student, weight_decay=0.01, clip=1.0)
        >>> engine.backward(loss)
        >>> engine.step(lr=1e-3)
    """

    every_rank = False  # whether each worker writes a part of a checkpoint

    def __init__(
        self, student: nn.Module, weight_decay: float, clip: float, wrap: Callable[[Any], Any] | None = None
    ) -> None:
        self.student: Any = student
        self.model, self.clip = wrap(student) if wrap else student, clip
        apart = student.separate_parameters() if isinstance(student, Student) else []
        of_senses = set(map(id, apart))
        self.clipped = [own for own in student.parameters() if id(own) not in of_senses], apart
        self.optimizer = torch.optim.AdamW(parameter_groups(student, weight_decay), fused=True)

    def slice_of_step(self, last: bool) -> AbstractContextManager[Any]:
        """Return a context for forward and backward of a slice of a step; gradients are reduced with the last."""
        return nullcontext() if last else getattr(self.model, "no_sync", nullcontext)()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a loss."""
        torch.autograd.backward(loss)

    def step(self, lr: float) -> None:
        """Clip the accumulated gradients, take a step and clear them; raise MsenseError if one is not finite."""
        if self.clip:
            for part in self.clipped:
                _check_norm(float(nn.utils.clip_grad_norm_(part, self.clip, foreach=True)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def whole(self) -> AbstractContextManager[Any]:
        """Return a context in which the student's weights are complete; all workers must enter it."""
        return nullcontext()

    def save(self, folder: Path) -> None:
        """Write trained weights and optimizer state to one file, and its checksum."""
        frozen = _frozen(self.student)
        tensors = {f"student.{name}": value for name, value in self.student.state_dict().items() if name not in frozen}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{number}.{name}": value for name, value in state.items()}
        save_file({name: value.detach().cpu().clone() for name, value in tensors.items()}, folder / TENSORS)
        (folder / CHECKSUM_FILE).write_text(storage.sha256_of(folder / TENSORS), encoding="ascii")

    def load(self, folder: Path) -> None:
        """Load what `save` wrote; raise InputError if it is corrupted or belongs to another student."""
        try:
            if storage.sha256_of(folder / TENSORS) != (folder / CHECKSUM_FILE).read_text(encoding="ascii"):
                raise ValueError(f"checksum mismatch of {TENSORS}")
            student = _frozen(self.student)
            states: dict[int, dict[str, Tensor]] = {}
            for name, value in load_file(folder / TENSORS).items():
                owner, _, key = name.partition(".")
                (student if owner == "student" else states.setdefault(int(owner), {}))[key] = value
            self.student.load_state_dict(student)
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        except _DAMAGE as error:
            raise checkpoint_error(folder, error) from error


class DeepSpeedEngine:
    """DeepSpeed engine; stage 1 shards the optimizer state over the workers, 2 also gradients, 3 also weights.

    All gradients are clipped together, so that separate senses change the steps of the other parameters.
    """

    every_rank = True

    def __init__(self, student: Student, weight_decay: float, clip: float, stage: int, device: str) -> None:
        """Initialize DeepSpeed; torch's process group must exist."""
        os.environ.setdefault("DS_ACCELERATOR", device)  # read when DeepSpeed is first imported
        os.environ["LOCAL_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", "1")  # workers of this node
        import deepspeed

        self.stage, self.clip = stage, clip
        config = {
            "train_micro_batch_size_per_gpu": 1,  # losses are normalized by `normalized_loss`, not by DeepSpeed
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip,
            "zero_optimization": {"stage": stage, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 60,
        }
        optimizer = torch.optim.AdamW(parameter_groups(student, weight_decay))
        self.student = student
        if device == "cpu":  # takes minutes to compile, and a worker killed meanwhile would block all later ones
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.model, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=config)

    def slice_of_step(self, last: bool) -> AbstractContextManager[Any]:
        """Set whether this slice completes the gradients."""
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a loss."""
        self.model.backward(loss)

    def step(self, lr: float) -> None:
        """Clip the gradients and take a step."""
        for group in self.model.optimizer.param_groups:
            group["lr"] = lr
        self.model.step()
        norm = self.model.get_global_grad_norm()
        if self.clip and norm is not None:
            _check_norm(float(norm))

    def whole(self) -> AbstractContextManager[Any]:
        """Gather the weights that stage 3 shards."""
        if self.stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.student.parameters()))

    def save(self, folder: Path) -> None:
        """Write this worker's shard."""
        self.model.save_checkpoint(str(folder), tag=ZERO)

    def load(self, folder: Path) -> None:
        """Load the shards; the number of workers must be the one that wrote them."""
        try:
            if self.model.load_checkpoint(str(folder), tag=ZERO)[0] is None:
                raise FileNotFoundError(f"{ZERO}/ is missing")
        except (*_DAMAGE, AssertionError) as error:
            raise checkpoint_error(folder, error) from error


Engine = DDPEngine | DeepSpeedEngine


def _frozen(student: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are not trained, by name."""
    return {name: parameter.detach() for name, parameter in student.named_parameters() if not parameter.requires_grad}


def prepare_process(threads: int) -> None:
    """Set the number of torch threads, and make glibc keep freed memory: the kernel zeroes each page that it hands out."""
    torch.set_num_threads(threads)
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)


def checkpoint_error(folder: Path, error: BaseException) -> InputError:
    """Return the error for a checkpoint that cannot be loaded."""
    return InputError(
        f"the checkpoint {folder} is corrupted ({first_line(error)}): delete {folder.parent} and run the same command "
        "again to train from the beginning"
    )


def _check_norm(norm: float) -> None:
    if not math.isfinite(norm):
        raise MsenseError("a gradient is not finite: use a smaller --lr, or train in float32")
