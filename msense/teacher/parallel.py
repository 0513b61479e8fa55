"""A teacher on several devices, or with its weights in host memory; for stages it is a `Teacher` like any other.

Split (`ParallelTeacher`): rank 0 in the process of the actor, the other ranks in its child processes, each with a part of
every layer (DeepSpeed's AutoTP) on a GPU or CPU of its own. A child (`python -m msense.teacher.parallel`) reads its settings
and then each batch from its standard input, and all ranks run the forward pass together. Children end with the actor's
process; if one is killed, that process ends too, so that the executor starts both anew.

Offloaded (`OffloadedTeacher`): DeepSpeed's ZeRO stage 3 streams each layer from host memory to the device.

Memory of a rank: its part of the layers, all embeddings, and the activations of one batch. Weights are read from the mapped
files in their own dtype, so that the ranks of a node share one copy in its page cache.
"""

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from msense.errors import InputError, MsenseError
from msense.io.scratch import scratch_folder
from msense.teacher.body import probe_ids
from msense.teacher.model import ROUNDING, Teacher
from msense.text import first_line

logger = logging.getLogger(__name__)
PROBED_LAYERS = 4  # compared with the whole model: more than the kinds of layers that a model alternates
PROBE_TOKENS = 12
LARGEST_SHARE = 1.25  # of the weights in a rank, in parts of an equal share: what is not cut are small matrices
ALWAYS_LOADED = 10_000  # numbers of a parameter that offloading leaves on the device: norms and biases
SECONDS_TO_REPORT = 60.0  # for the actor to raise the error of a child before its process ends
SECONDS_TO_NOTICE = 5.0  # for the end of a child that made the actor's own work fail
_LOG_BYTES = 2000  # of a child's log in an error message
_PR_SET_PDEATHSIG = 1


class OffloadedTeacher(Teacher):
    """A teacher whose weights stay in host memory, for one that is larger than the GPU.

    Example:
        >>> teacher = OffloadedTeacher("encoder", revision=None, layer=-1, dtype="float32", device="cpu")
    """

    def _start(self, model: Any) -> Any:
        """Return the engine; parameters pass through the device one at a time."""
        join_group(0, 1, dist.HashStore(), self.device)
        import deepspeed

        zero = {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": self.device == "cuda"}}
        zero |= {"stage3_param_persistence_threshold": ALWAYS_LOADED}
        config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        config |= {"bf16": {"enabled": self.dtype == "bfloat16"}, "fp16": {"enabled": self.dtype == "float16"}}
        model.to(getattr(torch, self.dtype))  # buffers too, as DeepSpeed's inference engine does
        with _printing_to_log():
            deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=getattr(torch, self.dtype))
            for module in model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = buffer.to(self.device)
            engine = deepspeed.initialize(model=model, config=config)[0]
        engine.eval()
        return engine


class SplitTeacher(Teacher):
    """One rank of a teacher: all ranks are made, and embed the same batches, at the same time.

    Args:
        name: see `Teacher`.
        rank: number of this process.
        ranks: how many there are.
        store: file through which they meet.
        options: those of `Teacher`.

    Raises:
        InputError: DeepSpeed cannot split this model, or splits it wrong.
    """

    loads_stored = True

    def __init__(self, name: str, *, rank: int, ranks: int, store: str, **options: Any) -> None:
        self.rank, self.ranks, self.store = rank, ranks, store
        super().__init__(name, **options)

    def ready(self) -> None:
        """Called when the model is loaded, before this rank waits for others."""

    def _start(self, model: Any) -> Any:
        """Return the engine of this rank's part."""
        expected, whole = self._first_layers(model, model), _cut_numbers(model)
        self.ready()
        join_group(self.rank, self.ranks, dist.FileStore(self.store, self.ranks), self.device)
        try:
            engine = self._split(model)
            found = self._first_layers(engine, engine.module)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise self._refused(f"DeepSpeed fails at this model ({first_line(error)})") from error
        change = float((found - expected).norm() / expected.norm().clamp(min=1e-6))
        if not change <= ROUNDING[self.dtype]:  # also true for NaN
            raise self._refused(f"its vectors change by {change:.1%}")
        if (share := _cut_numbers(engine.module) / whole) > LARGEST_SHARE / self.ranks:
            raise self._refused(f"every rank would hold {share:.0%} of the weights")
        return engine

    def _split(self, model: Any) -> Any:
        """Cut the matrices of a loaded model in their own dtype, then convert this rank's part."""
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        dtype = getattr(torch, self.dtype)
        stored = model.dtype if model.dtype in get_accelerator().supported_dtypes() else dtype
        parallel = {"tp_size": self.ranks}
        with _printing_to_log():
            engine = deepspeed.init_inference(
                model, tensor_parallel=parallel, dtype=stored, replace_with_kernel_inject=False
            )
        engine.module.to(dtype)
        return engine

    def _first_layers(self, engine: Any, model: Any) -> Tensor:
        """Return the hidden states of a probe after the first layers, or the last ones if layers have no list."""
        ids = probe_ids(model.config, PROBE_TOKENS).to(next(model.parameters()).device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        with torch.inference_mode():
            if (layer := _layer(model, PROBED_LAYERS)) is None:
                return self.inputs.hidden_states(engine, ids, mask).float().cpu()
            return _output(layer, lambda: self.inputs.hidden_states(engine, ids, mask)).float().cpu()

    def _refused(self, problem: str) -> InputError:
        return InputError(
            f"teacher {self.name!r} cannot be split over {self.ranks} ranks: {problem}; omit --ranks and --gpus-per-actor, and "
            "if one GPU cannot hold it, give --offload"
        )


class ParallelTeacher(SplitTeacher):
    """Rank 0 of a teacher, which starts the other ranks and hands them every batch.

    Example:
        >>> options = {"revision": None, "layer": -1, "dtype": "float32", "device": "cpu"}
        >>> with closing(ParallelTeacher("decoder", ranks=2, **options)) as teacher:
        ...     teacher.embed(ids, mask).shape
    """

    def __init__(self, name: str, *, ranks: int, **options: Any) -> None:
        """Load all ranks.

        Raises:
            InputError: see `SplitTeacher`.
            MsenseError: a rank failed; the message has its error.
        """
        self._closed = threading.Event()
        self._receivers: list[_Follower] = []
        self._scratch = contextlib.ExitStack()
        store = str(self._scratch.enter_context(scratch_folder()) / "ranks")
        given = {"name": name, **options}
        self.followers = [_Follower(rank, ranks, store, given, self._lost) for rank in range(1, ranks)]
        for follower in self.followers:
            follower.start()
        try:
            super().__init__(name, rank=0, ranks=ranks, store=store, **options)
        except Exception as error:
            raise self._failure(error) from error
        self._receivers = self.followers  # each made the checks of the constructor by itself

    def ready(self) -> None:
        """Wait until all ranks have loaded the model, as the first joint operation would not report a failure."""
        for follower in self.followers:
            follower.wait_ready()

    def embed(self, ids: np.ndarray, mask: np.ndarray) -> Tensor:
        """Compute the hidden states of one batch, see `Teacher.embed`; raise MsenseError if a rank failed."""
        try:
            for follower in self._receivers:
                follower.send(ids, mask)
            return super().embed(ids, mask)
        except Exception as error:
            if not self._receivers:  # the constructor reports it
                raise
            raise self._failure(error) from error

    def close(self) -> None:
        """End the other ranks and the process group."""
        self._closed.set()
        for follower in self.followers:
            follower.end()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._scratch.close()

    def _failure(self, error: Exception) -> Exception:
        """Return the error to raise for one of this rank, and close: that of another rank if it failed too."""
        if not isinstance(error, torch.OutOfMemoryError | MemoryError):
            for follower in self.followers:
                if follower.ended.wait(SECONDS_TO_NOTICE) and follower.code < 0:
                    follower.join()  # forever: `_lost` ends this process
        failures = [follower.failure for follower in self.followers if follower.failure is not None]
        self.close()
        return failures[0] if failures else error

    def _lost(self, follower: "_Follower") -> None:
        """End this process if a rank was killed, or if the error of a rank is not raised here: nothing can go on."""
        if follower.code >= 0 and self._closed.wait(SECONDS_TO_REPORT):
            return
        if not self._closed.is_set():
            logger.error("%s: this process ends, so that its work is started again", follower.failure)
            os._exit(1)


class _Follower(threading.Thread):
    """A rank in a child process, and the thread that starts it and waits for its end.

    The system ends the child with the thread that started it (PR_SET_PDEATHSIG); this one lasts as long as its process.
    """

    def __init__(
        self, rank: int, ranks: int, store: str, given: dict[str, Any], lost: Callable[["_Follower"], None]
    ) -> None:
        super().__init__(name=f"rank {rank} of the teacher", daemon=True)
        self.words = [sys.executable, "-m", "msense.teacher.parallel", str(rank), str(ranks), store, str(os.getpid())]
        self.given, self.lost = given, lost
        self.code = 0
        self.failure: Exception | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.ended = threading.Event()
        self._known = threading.Event()  # whether the rank is ready, or failed

    def run(self) -> None:
        """Start the rank; note what it reports, and how it ends."""
        with tempfile.TemporaryFile() as log:
            try:
                self._watch(log)
            except OSError as error:  # the system has no room for another process
                self.failure = MsenseError(f"cannot start {self.name}: {error}")
            self._known.set()
            self.ended.set()
        self.lost(self)

    def _watch(self, log: IO[bytes]) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # as multiprocessing does
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        self._process = subprocess.Popen(self.words, env=environment, **pipes)
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._write(json.dumps(self.given).encode() + b"\n")
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # of a line that a library printed before `main`
                self._note(json.loads(line))
        self.code = self._process.wait()
        if self.failure is None:
            self.failure = self._end(log)

    def _note(self, report: dict[str, Any]) -> None:
        """Note that the rank is ready, or its error."""
        if "error" in report:
            text = report["error"]
            self.failure = InputError(text) if report["input"] else MsenseError(f"{self.name} failed: {text}")
        self._known.set()

    def _end(self, log: IO[bytes]) -> MsenseError:
        """Return an error that says how a rank ended which reported none."""
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
        tail = log.read().decode(errors="replace").strip()
        how = f"was killed by signal {-self.code}" if self.code < 0 else f"ended with {self.code}"
        return MsenseError(f"{self.name} {how}" + f", after:\n{tail}" * bool(tail))

    @property
    def pid(self) -> int:
        """The id of the rank's process."""
        assert self._process is not None
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until the rank has loaded the model; raise its error if it failed."""
        self._known.wait()
        if self.failure is not None:
            raise self.failure

    def send(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """Hand a batch to the rank."""
        self._write(np.array(ids.shape, np.int32).tobytes() + np.stack([ids, mask]).astype(np.int32).tobytes())

    def _write(self, data: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def end(self) -> None:
        """End the rank, if it has not ended."""
        if self._process is not None:
            self._process.kill()
            self.join()


def join_group(rank: int, ranks: int, store: dist.Store, device: str) -> None:
    """Make this process one of a group that meets in a store; raise MsenseError if it has another place in one."""
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) == (rank, ranks):
            return
        raise MsenseError("this process is in a process group already: run the teacher in a process of its own")
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in numbers.items()}  # read by DeepSpeed
    if device == "cuda":
        torch.cuda.set_device(rank)
        here = torch.device("cuda", rank)
        dist.init_process_group("nccl", store=store, rank=rank, world_size=ranks, device_id=here)
        return
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    import deepspeed

    # sums through gloo: DeepSpeed's own operation in shared memory would first be compiled, for minutes
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _layer(model: nn.Module, count: int) -> nn.Module | None:
    """Return the layer number `count` from one, or the last one if there are fewer; None if layers have no list."""
    layers = int(model.config.get_text_config().num_hidden_layers)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    return lists[0][min(count, layers) - 1] if lists else None


class _ReachedError(Exception):
    """Ends a forward pass."""


def _output(layer: nn.Module, run: Callable[[], object]) -> Tensor:
    """Return the hidden states that a layer gives in a run, which ends there."""
    caught: list[Tensor] = []

    def note(_module: nn.Module, _inputs: object, output: Any) -> NoReturn:
        caught.append(output[0] if isinstance(output, tuple) else output)
        raise _ReachedError

    handle = layer.register_forward_hook(note)
    try:
        run()
    except _ReachedError:
        return caught[0]
    finally:
        handle.remove()
    raise RuntimeError("the layer was not run")


def _cut_numbers(model: nn.Module) -> int:
    """Return how many numbers the matrices of a model have without its embeddings, which are not cut."""
    modules = (module for module in model.modules() if not isinstance(module, nn.Embedding))
    return sum(p.numel() for module in modules for p in module.parameters(recurse=False) if p.dim() > 1)


@contextmanager
def _printing_to_log() -> Iterator[None]:
    """Log what a library prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        yield
    if text := printed.getvalue().strip():
        logger.debug("%s", text)


def main(rank: int, ranks: int, store: str, parent: int) -> None:
    """Run one rank until the process of rank 0 closes the pipe, or ends."""
    _end_with(parent)
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no report

    def report(**message: object) -> None:
        print(json.dumps(message), file=reports, flush=True)

    batches = sys.stdin.buffer
    try:
        given = json.loads(batches.readline())
        teacher = _ReportingTeacher(rank=rank, ranks=ranks, store=store, report=report, **given)
        while len(shape := np.frombuffer(batches.read(8), np.int32)):
            ids, mask = np.frombuffer(batches.read(8 * int(shape.prod())), np.int32).reshape(2, *shape)
            teacher.embed(ids, mask.astype(bool))
    except Exception as error:  # noqa: BLE001 - reported to the process of rank 0
        traceback.print_exc()
        text = str(error) if isinstance(error, MsenseError) else f"{type(error).__name__}: {first_line(error)}"
        report(error=text, input=isinstance(error, InputError))
        os._exit(1)
    os._exit(0)  # without waiting for other ranks


class _ReportingTeacher(SplitTeacher):
    """A rank in a child process, which reports that it is ready."""

    def __init__(self, name: str, *, report: Callable[..., None], **options: Any) -> None:
        self._report = report
        super().__init__(name, **options)

    def ready(self) -> None:
        """Report that the model is loaded."""
        self._report(ready=True)


def _end_with(parent: int) -> None:
    """Let the system end this process with that of rank 0, whatever either is doing."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), str(Path(sys.argv[3])), int(sys.argv[4]))
