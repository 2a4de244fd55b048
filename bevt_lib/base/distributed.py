"""torchrun's world in a handful of functions; without torchrun it is a world of one.

On one machine ``torchrun --nproc-per-node 8 -m bevt_lib.pretrain ...``. On several, the same
command on each, which meet at the first (HEAD, any free port):

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500 \\
        --rdzv-id RUN --max-restarts 3 -m bevt_lib.pretrain ...

Nodes may have different numbers of processes; all need the run folder on a common disk. With
``--max-restarts`` the processes start again by themselves after a worker is killed, from the last
checkpoint; on several nodes this needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's
environment (PyTorch issue 135712). SIGTERM to torchrun or to any worker saves and ends all;
torchrun gives its workers 30 s for it, or what ``--shutdown-timeout`` says. Source: PyTorch's
torchrun environment variables. gloo on CPU, NCCL on CUDA.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bevt_lib.base.trainable import Trainable

T = TypeVar("T")


def rank() -> int:
    """This process's number in the world, from 0."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def device() -> torch.device:
    """The device of this process: its own GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


@contextmanager
def world() -> Iterator[None]:
    """Join torchrun's process group for a run, if there is one and it isn't joined yet."""
    mine = "WORLD_SIZE" in os.environ and not torch_dist.is_initialized()
    if mine:
        if device().type == "cuda":
            torch.cuda.set_device(device())
        store, place, size = next(torch_dist.rendezvous("env://"))
        # torchrun's store outlives a restart with the addresses of dead workers in it (PyTorch
        # issue 135712). Its agents on several nodes don't count restarts alike: see above.
        one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"
        torch_dist.init_process_group(
            "nccl" if device().type == "cuda" else "gloo",
            store=torch_dist.PrefixStore(f"start_{start}", store), rank=place, world_size=size,
        )  # fmt: skip
    try:
        yield
    finally:
        if mine:
            # destroy_process_group can deadlock with gloo's threads over the GIL (seen in torch
            # 2.13; PyTorch issue 56297): let them finish first.
            time.sleep(0.1)
            torch_dist.destroy_process_group()


def torchrun(module: str, arguments: Sequence[str], processes: int) -> list[str]:
    """Write the command that runs ``bevt_lib.<module>`` under torchrun on this machine.

    It names this Python, so that it works where the environment is not activated.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={processes}", "-m", f"bevt_lib.{module}", *arguments]


def say(*lines: object) -> None:
    """Print lines on rank 0."""
    if rank() == 0:
        print(*lines, sep="\n")


def all_reduce_sum(values: Tensor) -> Tensor:
    """Add a tensor up over all processes, in place; the same tensor in a world of one."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait until every process is here."""
    if torch_dist.is_initialized():
        torch_dist.barrier()


def on_rank_zero(work: Callable[[], T]) -> T:
    """Let rank 0 do work; all processes get its result, or raise its ValueError or OSError."""
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = work()
        except (ValueError, OSError) as error:
            found[1] = error
    if torch_dist.is_initialized():
        torch_dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found.pop()  # the frame that the error holds must not hold the error
    return found[0]


def once_per_node(work: Callable[[], object], *, needed: bool = True) -> None:
    """Let the first process of each node do work whose result all of them then find on disk."""
    if needed and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        work()
    barrier()


def replicate(model: Trainable) -> Trainable:
    """Wrap a model so that gradients are averaged over processes; as it is in a world of one.

    A model with the attribute ``leaves_out`` may leave parameters out of a step.
    """
    if not torch_dist.is_initialized():
        return model
    ids = [device().index] if device().type == "cuda" else None
    unused, module = getattr(model, "leaves_out", False), cast(nn.Module, model)
    wrapped = DistributedDataParallel(module, device_ids=ids, find_unused_parameters=unused)
    return cast(Trainable, wrapped)


def gradients_stay_local(model: Trainable, local: bool) -> AbstractContextManager[None]:
    """Skip the exchange of gradients where ``local``: all but the last micro-batch of a step."""
    if local and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def blocks(count: int, size: int) -> list[list[int]]:
    """Cut items 0 .. count - 1 into blocks of ``size``; give those that fall to this process."""
    starts = range(rank() * size, count, world_size() * size)
    return [list(range(start, min(start + size, count))) for start in starts]


def gather(value: T) -> list[T]:
    """Give every process the values of all, by rank."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    torch_dist.all_gather_object(values, value)
    return values
