"""Training with several processes, described by torch.distributed's environment variables (``RANK`` ...)."""

import atexit
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ReduceOp
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from mdistiller_norm.data.plan import ALONE, Share
from mdistiller_norm.errors import ConfigError, UserError, first_line

REPORT_SECONDS = 5.0  # for processes to report after a failed collective
_store: Store | None = None


def process_share() -> Share:
    """Return the rank and the number of processes from the environment."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ALONE
    return Share(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def local_device() -> torch.device:
    """Return this process's GPU."""
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= gpus:
        raise ConfigError(f"LOCAL_RANK must be < {gpus}, the number of GPUs, got {local}")
    return torch.device("cuda", local)


def start(device: torch.device, timeout: int) -> Share:
    """Connect to the other processes, if any, with a timeout in seconds for this and every later collective."""
    global _store
    share = process_share()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for CUDA graphs and pinned memory
    if share.world == 1 or distributed.is_initialized():
        return share
    limit = timedelta(seconds=timeout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        _store, rank, world = next(rendezvous("env://", timeout=limit))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
            # When torchrun restarts the processes of one machine, its store still holds the addresses of the dead:
            # each attempt uses a prefix. (With several machines, their counts of attempts may differ.)
            _store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), _store)
        distributed.init_process_group(
            backend, store=_store, rank=rank, world_size=world, timeout=limit
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"process {share.rank} could not connect: {first_line(error)}"
        ) from error
    atexit.register(stop)  # later trainings of this process use the same group
    return share


def stop() -> None:
    """Destroy the process group, after the last collective."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """Exit; after distributed training, without finalising the interpreter."""
    if _store is None:
        sys.exit(code)
    if code:  # another process may have ended
        atexit.unregister(stop)
    # Gloo's threads release tensors with a delay. Finalising the interpreter meanwhile would abort the process.
    atexit._run_exitfuncs()  # stops loader workers, among others
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def together() -> bool:
    """Return whether several processes train together."""
    return distributed.is_initialized() and distributed.get_world_size() > 1


def is_first() -> bool:
    """Return whether this process writes the files: the only one, or the one of rank 0."""
    return not together() or distributed.get_rank() == 0


def launcher() -> str:
    """Return an identifier of torchrun's job, else of the parent process."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return job if job != "none" else f"{socket.gethostname()}:{os.getppid()}"


def all_reduce(tensor: Tensor, maximum: bool = False) -> Tensor:
    """Return the sum or the maximum over all processes."""
    if not together():
        return tensor
    tensor = tensor.clone()
    distributed.all_reduce(tensor, ReduceOp.MAX if maximum else ReduceOp.SUM)
    return tensor


def all_reduce_max(number: int) -> int:
    """Return the largest number of all processes, synchronising their hosts but not their GPUs."""
    return int(all_reduce(torch.tensor(number), maximum=True))


@torch.no_grad()
def average_batch_norms(module: nn.Module) -> None:
    """Average the running statistics of batch norms over all processes, in place."""
    kind = nn.modules.batchnorm._BatchNorm
    for norm in [norm for norm in module.modules() if isinstance(norm, kind) and together()]:
        for buffer in (norm.running_mean, norm.running_var):
            if buffer is not None:
                buffer.copy_(all_reduce(buffer) / distributed.get_world_size())


def synchronise_batch_norms(module: nn.Module) -> None:
    """Convert batch norms to SyncBatchNorm, those of timm with their activation, which PyTorch's function drops."""
    convert: Callable[..., Any] = nn.SyncBatchNorm.convert_sync_batchnorm
    with suppress(ImportError):
        convert = import_module("timm.layers").convert_sync_batchnorm
    convert(module)


def wrap(module: nn.Module) -> nn.Module:
    """Return DistributedDataParallel of the module, or for a single process the module."""
    if not together():
        return module
    # Buffers are not synchronised: batch norms are averaged when they are read, and CRD's memory is updated equally.
    parallel = DistributedDataParallel(module, gradient_as_bucket_view=True)
    parallel.broadcast_buffers = False  # as an argument, deprecated since PyTorch 2.14
    return parallel


@contextmanager
def collective_errors() -> Iterator[None]:
    """Convert the errors of collectives to one line that names the missing processes."""
    try:
        yield
    except RuntimeError as error:
        if "did not receive grad" in str(error):
            problem = "a parameter takes no part in the loss: remove it or freeze it"
            raise ConfigError(f"{problem} (TORCH_DISTRIBUTED_DEBUG=INFO names it)") from error
        lost = isinstance(error, distributed.DistError) or "gloo" in str(error).lower()
        if not (lost and together()):
            raise
        raise UserError(_missing_ranks(first_line(error))) from error


def _missing_ranks(reason: str) -> str:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    process, missing = f"process {rank} of {world}", set(range(world)) - {rank}
    try:
        assert _store is not None
        _store.set(f"here/{rank}", "")
        deadline = time.monotonic() + REPORT_SECONDS
        while missing and time.monotonic() < deadline:
            missing = {other for other in missing if not _store.check([f"here/{other}"])}
            time.sleep(0.1)
    except RuntimeError:
        missing = set()
    if not missing:
        return f"{process} lost its connection to the others ({reason})"
    others = ", ".join(map(str, sorted(missing)))
    return f"{process} timed out waiting for process {others} ({reason}): continue with --resume"
