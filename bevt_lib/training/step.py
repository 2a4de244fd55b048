"""One optimiser step: precision, accumulation, global means, and no update from numbers that
aren't finite. The only ``backward()`` is here.

Counts, losses and what else goes into the record are added up over the processes in float64;
gradients in the weights' own type: float32, or float64 with ``fp64``.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from bevt_lib.base import distributed
from bevt_lib.base.config import Optim, Run
from bevt_lib.base.seeds import uniform_noise
from bevt_lib.base.trainable import Batch, Part, Trainable
from bevt_lib.training.optim import parameter_groups
from bevt_lib.training.task import NOISE_KEYS, Task

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAX_NAMED = 8  # items of a stream that an error names


def choose_precision(name: str, device: torch.device) -> str:
    """Resolve "auto": bf16 on CUDA that computes in it, fp16 on older CUDA, fp32 on CPU.

    bf16 and fp16 are autocast over float32 weights, fp16 with a gradient scaler; fp32 and fp64 hold
    everything in that type.
    """
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def checkpoint_blocks(model: Trainable | nn.Module, switch: bool) -> None:
    """Let blocks keep only their inputs for the backward pass, or all they need there."""
    for part in model.modules():
        if hasattr(part, "checkpoint_activations"):
            part.checkpoint_activations = switch  # type: ignore[assignment]


def set_switches(model: Trainable, run: Run) -> None:
    """Apply ``run.checkpoint_activations`` and ``run.compile`` to a model, in place.

    Compiled are the blocks that ask for it, or if there are none the model's children; no
    parameter's name changes.
    """
    checkpoint_blocks(model, run.checkpoint_activations)
    if run.compile:
        # Each block is a variant of its own: depth, shift, stochastic depth, clips or images. What
        # eager mode caches, window plans, is computed in the graph.
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.accumulated_recompile_limit = 1024
        blocks = [part for part in model.modules() if getattr(part, "compiles_alone", False)]
        for part in blocks or model.children():
            part.compile(dynamic=False)


def stream_weights(optim: Optim) -> dict[str, float]:
    """Give the weights of the losses by stream; streams that aren't here weigh 1.

    Source: options of the released head, 1 and 1 in its config.
    """
    return dict(zip(("video", "image"), optim.loss_weights, strict=True))


@dataclass(frozen=True, kw_only=True)
class Update:
    """How a model is moved: everything an optimiser step needs beside its data."""

    task: Task
    wrapped: Trainable  # the model as it is replicated over processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: str
    optim: Optim
    run: Run

    @classmethod
    def start(cls, task: Task, optim: Optim, run: Run) -> "Update":
        """Bring a model to its device and precision, and make its optimiser and scaler."""
        device, model = distributed.device(), task.model
        precision = choose_precision(run.precision, device)
        model.to(device).train()
        if precision == "fp64":
            model.double()
        set_switches(model, run)
        groups = parameter_groups(model, optim, task.rename)
        return cls(
            task=task, wrapped=distributed.replicate(model), precision=precision, optim=optim,
            run=run, optimizer=torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas),
            scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        )  # fmt: skip

    def step(
        self, micros: list[Batch], step: int, rate: float, extra_sums: Mapping[str, float]
    ) -> dict[str, float]:
        """Make one optimiser step from its micro-batches; return its losses and gradient norm.

        ``extra_sums``: numbers of this process to be added up with the losses. A step whose
        gradient overflows in fp16 is left out ("skipped" is 1, no "grad_norm"). Raises
        ValueError before the update, on all processes, where the loss or the gradient isn't finite.
        """
        task, device = self.task, distributed.device()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        # Prepare the inputs, and count each stream's items in the global batch.
        with torch.no_grad():
            prepared = [self._cast(task.prepare(batch, step)) for batch in micros]
        streams = list(prepared[0])
        counted = [task.model.counts(batch) for batch in prepared]
        counts = torch.tensor(counted, dtype=torch.float64, device=device).sum(0)
        totals = distributed.all_reduce_sum(counts).clamp(min=1).tolist()
        # Forward and backward, one micro-batch after the other.
        kind = AUTOCAST.get(self.precision)
        weights = stream_weights(self.optim)
        sums = {k: torch.tensor(v, dtype=torch.float64, device=device)
                for k, v in extra_sums.items()}  # fmt: skip
        losses: list[Tensor] = []  # (streams,) for each micro-batch
        self.optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(prepared):
            noise = self._noise(batch, step)
            with distributed.gradients_stay_local(self.wrapped, number < len(prepared) - 1):
                with torch.autocast(device.type, kind, enabled=kind is not None):
                    terms = self.wrapped(batch, noise)
                means = [weights.get(s, 1.0) * (terms[s].loss / n)
                         for s, n in zip(streams, totals, strict=True)]  # fmt: skip
                # DDP averages gradients over processes; the global count is divided by already.
                total = torch.stack(means).sum() * distributed.world_size()
                self.scaler.scale(total).backward()
            losses.append(torch.stack([terms[s].loss.detach().double() for s in streams]))
            for stream, n in zip(streams, totals, strict=True):
                logs = {"loss": terms[stream].loss.detach(), **terms[stream].logs}
                for key, value in logs.items():
                    name = f"{stream}/{key}"
                    sums[name] = sums.get(name, 0.0) + value.double() / n
        # Add the record up over the processes, and refuse a loss that isn't finite.
        values = distributed.all_reduce_sum(torch.stack(list(sums.values()))).tolist()
        entry = dict(zip(sums, values, strict=True))
        loss = sum(weights.get(s, 1.0) * entry[f"{s}/loss"] for s in streams)
        if not math.isfinite(loss):
            wrong = [(m[s], s) for m, row in zip(micros, losses, strict=True)
                     for s, value in zip(streams, row.tolist(), strict=True)
                     if not math.isfinite(value)]  # fmt: skip
            raise self._refusal(f"the loss is {loss}", step, wrong)
        # Clip the gradient, refuse one that isn't finite, and move the weights.
        self.scaler.unscale_(self.optimizer)
        parameters = task.model.parameters()
        norm = float(nn.utils.clip_grad_norm_(parameters, self.optim.clip_norm or math.inf))
        skipped = not math.isfinite(norm)
        # If the scale has fallen below 1, the overflow isn't caused by loss scaling.
        if skipped and (not self.scaler.is_enabled() or self.scaler.get_scale() < 1):
            all_parts = [(m[s], s) for m in micros for s in streams]
            raise self._refusal(f"the loss is {loss}, but its gradient {norm}", step, all_parts)
        if not skipped:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        entry |= {"skipped": float(skipped)} if self.scaler.is_enabled() else {}
        return {"loss": loss, **entry} | ({} if skipped else {"grad_norm": norm})

    def _cast(self, batch: Batch) -> Batch:
        if self.precision != "fp64":
            return batch
        return {
            stream: cast(Part, {
                k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
                for k, v in part.items()
            })
            for stream, part in batch.items()
        }  # fmt: skip

    def _noise(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Draw each sample's uniforms, keyed by (seed, stream, step, its place in the order)."""
        sizes, seed, device = self.task.model.noise_sizes, self.run.seed, distributed.device()
        return {
            s: uniform_noise(seed, part["position"].tolist(), sizes[s], NOISE_KEYS[s], step).to(
                device
            )
            for s, part in batch.items()
        }

    def _refusal(self, what: str, step: int, parts: Sequence[tuple[Part, str]]) -> ValueError:
        """Make the same error on all processes: what is wrong, and the items of all of them."""
        named = []
        for stream, source in self.task.sources.items():
            first = step * source.batch
            marks = torch.zeros(source.batch, device=distributed.device())
            for part, of in parts:
                if of == stream:
                    marks[part["position"] - first] = 1
            distributed.all_reduce_sum(marks)
            positions = (marks.nonzero().flatten() + first).tolist()
            for position in positions[:MAX_NAMED]:
                name = source.items.name(source.items.index_at(position)[1])
                named.append(f"{stream} {position} ({name})")
            named += [f"{len(positions) - MAX_NAMED} more"] if len(positions) > MAX_NAMED else []
        return ValueError(
            f"{what} at step {step}, before its update; items {', '.join(named)}: look at them, "
            "try a lower --optim.lr or --run.precision fp32; the same command continues from the "
            "last checkpoint"
        )
