"""torchrun's world in a handful of functions; without torchrun it is a world of one.

Source: PyTorch's torchrun environment variables. gloo on CPU, NCCL on CUDA.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


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
    """Join torchrun's world for the time of a run, if there is one and it isn't joined yet."""
    mine = "WORLD_SIZE" in os.environ and not torch_dist.is_initialized()
    if mine:
        if device().type == "cuda":
            torch.cuda.set_device(device())
        torch_dist.init_process_group("nccl" if device().type == "cuda" else "gloo")
    try:
        yield
    finally:
        if mine:
            torch_dist.destroy_process_group()


def torchrun(module: str, arguments: Sequence[str], processes: int) -> list[str]:
    """Write the command that runs ``bevt_lib.<module>`` under torchrun on this machine.

    It names this Python, so that it works where the environment is not activated.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={processes}", "-m", f"bevt_lib.{module}", *arguments]


def sum_over_processes(values: Tensor) -> Tensor:
    """Add a tensor up over all processes, in place; the same tensor in a world of one."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(values)
    return values


def wait_for_all() -> None:
    """Wait until every process is here."""
    if torch_dist.is_initialized():
        torch_dist.barrier()


def first_alone(work: Callable[[], object], *, needed: bool = True) -> None:
    """Let rank 0 do work whose result all processes then find on disk."""
    if needed and rank() == 0:
        work()
    wait_for_all()


def replicate(model: nn.Module) -> nn.Module:
    """Wrap a model so that gradients are averaged over processes; as it is in a world of one."""
    if not torch_dist.is_initialized():
        return model
    ids = [device().index] if device().type == "cuda" else None
    # A tokenizer's last steps leave its encoder out; the released recipe sets this, too.
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)


def gradients_stay_local(model: nn.Module, local: bool) -> AbstractContextManager:
    """Skip the exchange of gradients where ``local``: all but the last micro-batch of a step."""
    if local and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()
