"""Several processes that train together: torch.distributed, started by torchrun, by Slurm or by hand.

Who a process is comes from the environment: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and
``MASTER_PORT``. A process alone needs none of it, and every function here then does nothing.
"""

from __future__ import annotations

import atexit
import inspect
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from mdistiller_norm.data.plan import ALONE, Share
from mdistiller_norm.errors import ConfigError, UserError, first_line

ROLL_CALL = 5.0  # seconds that a process has to say that it is still there, after a collective failed
_store: Store | None = None


class LostProcessError(UserError):
    """A process did not come to where the others waited for it."""


def wanted() -> Share:
    """This process among those that were started together, by the environment.

    Raises:
        ConfigError: the environment says something impossible.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ALONE
    share = Share(_number("RANK"), _number("WORLD_SIZE"))
    if not 0 <= share.rank < share.world:
        raise ConfigError(f"RANK is {share.rank} and WORLD_SIZE {share.world} in the environment: start with torchrun")
    return share


def _number(name: str) -> int:
    text = os.environ.get(name, "0")
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r} in the environment, not a number: start with torchrun") from error


def local_device() -> torch.device:
    """The GPU of this process among those of its machine.

    Raises:
        ConfigError: there are fewer GPUs than processes, or the environment says something impossible.
    """
    local = _number("LOCAL_RANK")
    if not 0 <= local < torch.cuda.device_count():
        raise ConfigError(
            f"process {local + 1} of this machine has no GPU, there are {torch.cuda.device_count()}: start fewer "
            "processes, or set DEVICE to cpu"
        )
    return torch.device("cuda", local)


def start(device: torch.device, timeout: int) -> Share:
    """Find the others, if there are any; from here on the device is the current one.

    Args:
        device: of this process.
        timeout: seconds that a process waits for the others, here and in every later collective.

    Raises:
        ConfigError: the others cannot be found.
    """
    global _store
    share = wanted()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where graphs are captured and memory is pinned, whatever the tensors' device
    if share.world == 1 or distributed.is_initialized():
        return share
    limit = timedelta(seconds=timeout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        _store, rank, world = next(rendezvous("env://", timeout=limit))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
            # torchrun keeps its store when it restarts the processes of one machine, and with it the addresses of the
            # dead: every attempt looks in a place of its own. (Over several machines the counts may differ.)
            _store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", _store)
        distributed.init_process_group(backend, store=_store, rank=rank, world_size=world, timeout=limit)
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(f"process {share.rank} of {share.world} could not find the others: {reason}") from error
    return share


def stop() -> None:
    """Leave the others, after the last collective."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """End the process with an exit code; where there were others, without taking the interpreter down.

    Gloo's threads give the tensors of collectives back some time after these are done, also once the group is gone. If
    the interpreter is ending meanwhile, the process aborts (SIGABRT) in place of its exit code.
    """
    if _store is None:
        sys.exit(code)
    atexit._run_exitfuncs()  # worker processes, and whatever else has something left to do
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def together() -> bool:
    """Whether there are other processes."""
    return distributed.is_initialized() and distributed.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the one that writes: the first, or the only one."""
    return not together() or distributed.get_rank() == 0


def restarted() -> bool:
    """Whether torchrun started this process again after a failure."""
    return _number("TORCHELASTIC_RESTART_COUNT") > 0


def launcher() -> str:
    """What started this process, and would start it again: torchrun's id of the job, else the parent process."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return job if job != "none" else f"{socket.gethostname()}:{os.getppid()}"


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, which all call this with one shape; the tensor itself where there is only one."""
    return _reduced(tensor, distributed.ReduceOp.SUM)


def largest(tensor: Tensor) -> Tensor:
    """The maximum over all processes, which all call this with one shape; the tensor itself where there is only one."""
    return _reduced(tensor, distributed.ReduceOp.MAX)


def all_reduce_max(number: int) -> int:
    """The largest of all processes' numbers; all of them wait here, on the CPU, not for their GPUs."""
    return int(largest(torch.tensor(number))) if together() else number


def _reduced(tensor: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
    if not together():
        return tensor
    tensor = tensor.clone()
    distributed.all_reduce(tensor, operation)
    return tensor


@torch.no_grad()
def average_batch_norms(module: nn.Module) -> None:
    """Give all processes the mean of their batch norms' running statistics, in place."""
    if not together():
        return
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    if buffers:
        flat = total(torch.cat([buffer.flatten() for buffer in buffers])) / distributed.get_world_size()
        means = torch.split(flat, [buffer.numel() for buffer in buffers])
        for buffer, mean in zip(buffers, means, strict=True):
            buffer.copy_(mean.view_as(buffer))


def wrap(module: nn.Module) -> nn.Module:
    """The module with its gradients averaged over all processes; the module itself where there is only one.

    Buffers stay each process's own: batch norms are averaged when it matters, and what else there is (CRD's memory) is
    kept equal by whoever writes it.
    """
    if not together():
        return module
    # PyTorch 2.14 has a new name for it.
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    no_sync: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **no_sync)


def synchronise_batch_norms(module: nn.Module, device: torch.device) -> None:
    """Make a module's batch norms, none of which is the module itself, run over the batch of all processes.

    Raises:
        ConfigError: not on CUDA.
    """
    if device.type != "cuda":
        raise ConfigError("SOLVER.SYNC_BN needs CUDA: PyTorch has synchronised batch norm for GPUs only")
    if together():
        nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]


@contextmanager
def collective_errors() -> Iterator[None]:
    """Turn the failure of a collective into one line that names the missing processes.

    Raises:
        LostProcessError: a process hangs, has died, or cannot be reached.
        ConfigError: a parameter, of a plugin's network or method, has no gradient to be exchanged.
    """
    try:
        yield
    except RuntimeError as error:
        if "did not receive grad" in str(error):  # DistributedDataParallel's words, of which it needs a dozen lines
            raise ConfigError(
                "a parameter of the student or of a method takes no part in the loss, which several processes cannot "
                "train with: remove it or set its requires_grad to False (TORCH_DISTRIBUTED_DEBUG=INFO names it)"
            ) from error
        if not together() or not (isinstance(error, distributed.DistError) or "gloo" in str(error).lower()):
            raise
        raise LostProcessError(_missing_ranks(error)) from error


def _missing_ranks(error: RuntimeError) -> str:
    """Who does not answer within a few seconds, all the others having failed at about the same time."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    reason = first_line(error)
    missing = set(range(world)) - {rank}
    try:
        assert _store is not None
        _store.set(f"here/{rank}", "")
        deadline = time.monotonic() + ROLL_CALL
        while missing and time.monotonic() < deadline:
            missing = {other for other in missing if not _store.check([f"here/{other}"])}
            time.sleep(0.1)
    except RuntimeError:
        return f"process {rank} of {world} lost the others ({reason})"
    if not missing:
        return f"process {rank} of {world} lost its connection to the others ({reason})"
    names = ", ".join(str(other) for other in sorted(missing))
    return (
        f"process {rank} of {world} waited in vain for process {names}: it hangs or has died ({reason}); "
        "the state of the last checkpoint is safe, --resume goes on from it"
    )
