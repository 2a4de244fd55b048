"""One optimiser step: precision, accumulation, global means, and no update from numbers that
aren't finite. The only ``backward()`` is here.

Counts, losses and what else goes into the record are added up over the processes in float64;
gradients in the weights' own type: float32, or float64 with ``fp64``.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bevt_lib.base import distributed
from bevt_lib.base.config import Optim, Run
from bevt_lib.base.seeds import Stream, uniform_noise
from bevt_lib.datasets.items import Positions
from bevt_lib.model.swin import Block, Swin
from bevt_lib.training.optim import parameter_groups

Batch = dict[str, dict[str, Any]]
Trainable = Any  # an nn.Module with forward(batch, noise), counts(batch) and noise_sizes
NOISE_STREAM = {"video": Stream.VIDEO, "image": Stream.IMAGE}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAX_NAMED = 8  # items of a stream that an error names


@dataclass(frozen=True)
class Source:
    """One stream of a run: where its items come from and how many one step takes in all."""

    items: Positions
    batch: int  # global


def choose_precision(name: str, device: torch.device) -> str:
    """Settle "auto": bf16 on CUDA that computes in it, fp16 on older CUDA, fp32 on CPU.

    bf16 and fp16 are autocast over float32 weights, fp16 with a gradient scaler; fp32 and fp64 hold
    everything in that type.
    """
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def checkpoint_blocks(model: nn.Module, switch: bool) -> None:
    """Let Swin's blocks keep only their inputs for the backward pass, or all they need there."""
    for part in model.modules():
        if isinstance(part, Swin):
            part.checkpoint_activations = switch


def set_switches(model: nn.Module, run: Run) -> None:
    """Apply ``run.checkpoint_activations`` and ``run.compile`` to a model, in place.

    Swin's blocks are compiled, or without Swin the model's children; no parameter's name changes.
    """
    checkpoint_blocks(model, run.checkpoint_activations)
    if run.compile:
        # Each block is a variant of its own: depth, shift, stochastic depth, clips or images. What
        # eager mode caches, window plans, is computed in the graph.
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.accumulated_recompile_limit = 1024
        for part in [m for m in model.modules() if isinstance(m, Block)] or model.children():
            part.compile(dynamic=False)


@dataclass(frozen=True, kw_only=True)
class Update:
    """How a model is moved: everything an optimiser step needs beside its data."""

    model: Trainable
    wrapped: nn.Module  # the model as it is replicated over processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: str
    optim: Optim
    run: Run
    sources: Mapping[str, Source]
    prepare: Callable[[Batch, int], Batch]

    @classmethod
    def start(
        cls,
        model: Trainable,
        sources: Mapping[str, Source],
        optim: Optim,
        run: Run,
        prepare: Callable[[Batch, int], Batch],
        rename: Callable[[str], str],
    ) -> "Update":
        """Bring a model to its device and precision, and make its optimiser and scaler."""
        device = distributed.device()
        precision = choose_precision(run.precision, device)
        model.to(device).train()
        if precision == "fp64":
            model.double()
        set_switches(model, run)
        groups = parameter_groups(model, optim, rename)
        return cls(
            model=model, wrapped=distributed.replicate(model), precision=precision, optim=optim,
            run=run,
            optimizer=torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas),
            scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
            sources=sources, prepare=prepare,
        )  # fmt: skip

    def step(
        self, micros: list[Batch], step: int, rate: float, extra_sums: Mapping[str, float]
    ) -> dict[str, float]:
        """Make one optimiser step from its micro-batches; return its losses and gradient norm.

        ``extra_sums``: numbers of this process to be added up with the losses. A step whose
        gradient overflows in fp16 is left out ("skipped" is 1, no "grad_norm"). Raises
        ValueError before the update, on all processes, where the loss or the gradient isn't finite.
        """
        device = distributed.device()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        with torch.no_grad():
            prepared = [self._cast(self.prepare(batch, step)) for batch in micros]
        streams = list(prepared[0])
        counted = [self.model.counts(batch) for batch in prepared]
        counts = torch.tensor(counted, dtype=torch.float64, device=device).sum(0)
        totals = distributed.all_reduce_sum(counts).clamp(min=1).tolist()
        kind = AUTOCAST.get(self.precision)
        sums = {
            k: torch.tensor(v, dtype=torch.float64, device=device) for k, v in extra_sums.items()
        }
        losses: list[Tensor] = []  # (streams,) for each micro-batch
        self.optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(prepared):
            noise = self._noise(batch, step)
            with distributed.gradients_stay_local(self.wrapped, number < len(prepared) - 1):
                with torch.autocast(device.type, kind, enabled=kind is not None):
                    terms = self.wrapped(batch, noise)
                means = [terms[s].loss / n for s, n in zip(streams, totals, strict=True)]
                # DDP averages gradients over processes; the global count is divided by already.
                self.scaler.scale(sum(means) * distributed.world_size()).backward()
            losses.append(torch.stack([terms[s].loss.detach().double() for s in streams]))
            for stream, n in zip(streams, totals, strict=True):
                logs = {"loss": terms[stream].loss.detach(), **terms[stream].logs}
                for key, value in logs.items():
                    name = f"{stream}/{key}"
                    sums[name] = sums.get(name, 0.0) + value.double() / n
        values = distributed.all_reduce_sum(torch.stack(list(sums.values()))).tolist()
        entry = dict(zip(sums, values, strict=True))
        loss = sum(entry[f"{s}/loss"] for s in streams)
        if not math.isfinite(loss):
            wrong = [(m[s], s) for m, row in zip(micros, losses, strict=True)
                     for s, value in zip(streams, row.tolist(), strict=True)
                     if not math.isfinite(value)]  # fmt: skip
            raise self._refusal(f"the loss is {loss}", step, wrong)
        self.scaler.unscale_(self.optimizer)
        parameters = self.model.parameters()
        norm = float(nn.utils.clip_grad_norm_(parameters, self.optim.clip_norm or math.inf))
        skipped = not math.isfinite(norm)
        # A scale that has fallen below 1 means that it isn't the scale.
        if skipped and (not self.scaler.is_enabled() or self.scaler.get_scale() < 1):
            all_of_it = [(m[s], s) for m in micros for s in streams]
            raise self._refusal(f"the loss is {loss}, but its gradient {norm}", step, all_of_it)
        if not skipped:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        entry |= {"skipped": float(skipped)} if self.scaler.is_enabled() else {}
        return {"loss": loss, **entry} | ({} if skipped else {"grad_norm": norm})

    def _cast(self, batch: Batch) -> Batch:
        if self.precision != "fp64":
            return batch
        return {
            stream: {
                k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
                for k, v in part.items()
            }
            for stream, part in batch.items()
        }

    def _noise(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Draw each sample's uniforms, keyed by (seed, stream, step, its place in the order)."""
        sizes, seed = self.model.noise_sizes, self.run.seed
        return {
            s: uniform_noise(
                seed, part["position"].tolist(), sizes[s], NOISE_STREAM.get(s, 2), step
            ).to(distributed.device())
            for s, part in batch.items()
        }

    def _refusal(self, what: str, step: int, parts: Sequence[tuple[dict, str]]) -> ValueError:
        """Say the same on all processes: what is wrong, and with which items of any of them."""
        named = []
        for stream, source in self.sources.items():
            first = step * source.batch
            marks = torch.zeros(source.batch, device=distributed.device())
            for part, of in parts:
                if of == stream:
                    marks[part["position"] - first] = 1
            distributed.all_reduce_sum(marks)
            positions = (marks.nonzero().flatten() + first).tolist()
            named += [self._name(stream, position) for position in positions[:MAX_NAMED]]
            named += [f"{len(positions) - MAX_NAMED} more"] if len(positions) > MAX_NAMED else []
        return ValueError(
            f"{what} at step {step}, before its update; items {', '.join(named)}: look at them, "
            "try a lower --optim.lr or --run.precision fp32; the same command continues from the "
            "last checkpoint"
        )

    def _name(self, stream: str, position: int) -> str:
        items = self.sources[stream].items
        entries = getattr(items.items, "entries", None)
        path = f" ({entries[items.index_at(position)[1]].path})" if entries else ""
        return f"{stream} {position}{path}"
