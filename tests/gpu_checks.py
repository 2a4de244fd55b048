"""What must be the same on a GPU, each check a function that tells what it found.

"right" is true or false, or None for a number to know. On a CPU, the rehearsal, the same lines run
and most is trivially right.
"""

import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import kill_runs
import numpy as np
import tiny_run
import torch
from golden_numbers import CASES, TOLERANCES, arrays, rule_input
from test_model_golden import (
    BACKBONES,
    CLASSIFIERS,
    StandInTokenizer,
    architecture,
    deviation,
    fill,
    relative,
)

from bevt_lib import parts, tokenizer_scores
from bevt_lib.base import distributed
from bevt_lib.base.config import Run
from bevt_lib.model.attention import fused_attention, plain_attention
from bevt_lib.model.bevt import BEVT
from bevt_lib.model.classifier import Classifier
from bevt_lib.model.swin import window_plan
from bevt_lib.scoring import speed
from bevt_lib.tokenizers.load import load_tokenizer
from bevt_lib.training.step import Update
from bevt_lib.weights.formats import released_name

DEVICE = distributed.device()
Found = dict[str, Any]


Deviations = Iterator[tuple[str, float]]  # by group, one of GOLDEN
GOLDEN = {"features": "outputs_atol", "logits": "outputs_atol", "losses": "loss_rtol",
          "gradients": "grad_norm_rtol"}  # fmt: skip


def put(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bring a tensor to the device, and numbers that aren't whole to a type."""
    return x.to(DEVICE, dtype) if x.is_floating_point() else x.to(DEVICE)


def masks_of(numbers: Any, name: str) -> torch.Tensor:
    return torch.from_numpy(numbers[name]).bool().to(DEVICE)


def golden_features(dtype: torch.dtype) -> Deviations:
    """Hold BEVT's features of clips and images against the released code's."""
    for config, case in BACKBONES:
        numbers, name, mask = arrays(config["file"]), case["name"], None
        model = fill(BEVT(vocab_size=4, **architecture(config)), config["weight_scale"])
        pixels = put(rule_input(case["seed"], case["input_shape"]), dtype)
        if case["mask_shape"]:
            mask = masks_of(numbers, f"{name}/mask")
        if case["kind"] == "image":
            pixels, mask = pixels[:, :, None], None if mask is None else mask[:, None]
        with torch.no_grad():
            out = model.to(DEVICE, dtype).features(case["kind"], pixels, mask).flatten(1, 3)
        yield "features", deviation(out.cpu(), numbers, name)


def golden_classifiers(dtype: torch.dtype) -> Deviations:
    """Hold the classifier's features, logits and losses against the released code's."""
    for config, case in CLASSIFIERS:
        numbers, name, classes = arrays(config["file"]), case["name"], config["num_classes"]
        model = Classifier(num_classes=classes, **architecture(config))
        model = fill(model, config["weight_scale"]).to(DEVICE, dtype)
        pixels = put(rule_input(case["seed"], case["input_shape"]), dtype)
        views = case["kind"] == "views"
        with torch.no_grad():
            pixels = pixels[0] if views else pixels
            found = {"logits_per_view" if views else "logits": model.logits(pixels)}
            if not views:
                found["feat"] = model.features(pixels).permute(0, 4, 1, 2, 3)[:, ::5]
        for key, mine in found.items():
            far = float(np.abs(mine.cpu().numpy() - numbers[f"{name}/{key}"]).max())
            yield "features" if key == "feat" else "logits", far
        if not views:
            label = torch.from_numpy(numbers[f"{name}/labels"]).long().to(DEVICE)
            term = model({"clip": {"pixels": pixels, "label": label}})["clip"]
            mean = term.loss.detach() / term.count
            yield "losses", relative(mean, numbers[f"{name}/loss_hard"])


def golden_losses(dtype: torch.dtype) -> Deviations:
    """Hold both streams' losses, and all gradients' lengths, against the released code's."""
    for case in CASES["loss_and_gradients"]:
        numbers, seed = arrays(case["file"]), case["seed"]
        config = next(c for c in CASES["pretraining_backbone"] if c["name"] == case["backbone"])
        model = fill(BEVT(vocab_size=case["vocab"], **architecture(config)), case["weight_scale"])
        tokenizer = StandInTokenizer(case["vocab"], case["weight_scale"])
        clips = tokenizer(rule_input(seed + 1, case["video_frames_shape"]))
        images = tokenizer(rule_input(seed + 3, case["image_frames_shape"]))
        pixels = {"video": rule_input(seed, case["video_shape"]),
                  "image": rule_input(seed + 2, case["image_shape"])[:, :, None]}  # fmt: skip
        ids = {"video": clips.unflatten(0, (case["video_shape"][0], -1)), "image": images[:, None]}
        masks = {"video": masks_of(numbers, "mask_video_in"),
                 "image": masks_of(numbers, "mask_image")[:, None]}  # fmt: skip
        terms = model.to(DEVICE, dtype)({
            s: {"pixels": put(pixels[s], dtype), "ids": put(ids[s], dtype), "mask": masks[s]}
            for s in pixels})  # fmt: skip
        means = {s: term.loss / term.count for s, term in terms.items()}
        for stream, key in (("video", "loss_cls_3d"), ("image", "loss_cls_2d")):
            yield "losses", relative(means[stream].detach(), numbers[key])
        (means["video"] + means["image"]).backward()
        norms = {released_name(n): p.grad.double().norm() for n, p in model.named_parameters()}
        for name, expected in zip(numbers["grad_names"], numbers["grad_norms"], strict=True):
            if expected > 1e-7:  # a key's bias has no gradient but rounding
                yield "gradients", relative(norms[name], expected)


def golden(dtype: torch.dtype, *, tf32: bool = False) -> Found:
    """Compare with the released code's numbers, group by group, in float32 or float64.

    ``tf32``: cuDNN may round to TF32, as PyTorch lets it; a number to know, not to be right.
    """
    torch.backends.cudnn.allow_tf32 = tf32
    worst = dict.fromkeys(GOLDEN, 0.0)
    for compare in (golden_features, golden_classifiers, golden_losses):
        for group, far in compare(dtype):
            worst[group] = max(worst[group], far) if far == far else far  # NaN stays
    allowed = {group: TOLERANCES[name] for group, name in GOLDEN.items()}
    right = all(worst[group] <= allowed[group] for group in GOLDEN)
    return {"right": None if tf32 else right, "deviation": worst, "allowed": allowed}


def attend(way: Callable[..., torch.Tensor], masks: Any, kind: torch.dtype,
           given: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:  # fmt: skip
    """Give the output and both gradients of one way of attention, computed in a type."""
    qkv, bias, grad = (t.detach().to(DEVICE) for t in given)
    qkv, bias = qkv.to(kind), bias.to(torch.promote_types(kind, torch.float32))  # as weights are
    qkv.requires_grad_(), bias.requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=kind == torch.bfloat16):
        out = way(qkv, bias, masks)
    out.backward(grad.to(out.dtype))
    return [t.detach().double() for t in (out, qkv.grad, bias.grad)]


def attention(dtype: torch.dtype, allowed: float, tiny: bool) -> Found:
    """Compare fused and plain attention, and gradients, with float64, for each kind of window.

    Deviations are relative, of a whole tensor's length.
    """
    d, h, w = window = (2, 4, 4) if tiny else (8, 7, 7)
    maps = {  # (map, shifted, released quirks)
        "whole": ((d, 2 * h, 2 * w), False, False),
        "shifted": ((2 * d, 2 * h, 2 * w), True, False),
        "padded": ((d, h + 2, 2 * w - 1), True, False),
        "small": ((d // 2, h - 2, w - 2), False, False),
        "image": ((1, 2 * h, 2 * w), True, False),
        "released image": ((1, 2 * h, 2 * w), False, True),
    }
    rng, found = torch.Generator().manual_seed(0), {}
    for name, (size, shifted, quirks) in maps.items():
        plan = window_plan(size, window, shifted, quirks, DEVICE)
        n = math.prod(plan.window)
        shape = (2, math.prod(plan.padded) // n, n)
        given = (torch.randn(*shape, 3, 4, 32, generator=rng).to(dtype),
                 torch.randn(4, n, n, generator=rng),
                 torch.randn(*shape, 4, 32, generator=rng).to(dtype))  # fmt: skip
        exact = attend(plain_attention, plan.mask, torch.float64, given)
        ways = {"fused": (fused_attention, plan.kinds), "plain": (plain_attention, plan.mask)}
        for who, (way, masks) in ways.items():
            pairs = zip(attend(way, masks, dtype, given), exact, strict=True)
            far = [float((mine - right).norm() / right.norm()) for mine, right in pairs]
            found[f"{name}, {who}"] = dict(zip(("out", "qkv.grad", "bias.grad"), far, strict=True))
    right = all(value <= allowed for far in found.values() for value in far.values())
    return {"right": right, "allowed": allowed, "deviation": found}


def half_precision(tiny: bool) -> Found:
    """Compare the loss of a joint step in bf16 and fp16 with fp32's: within one per cent."""
    sizes = speed.TINY_SIZES if tiny else replace(speed.GPU_SIZES, images=8, frames=16)
    step, entries = speed.JointStep(sizes), {}
    for name in ("fp32", "bf16", "fp16"):
        update = Update.start(step.update.task, speed.OPTIM, Run(precision=name))
        entries[name] = update.step([step.batch(0)], 0, 0.0, {})
    off = {k: relative(e["loss"], entries["fp32"]["loss"]) for k, e in entries.items()}
    return {"right": max(off.values()) < 0.01, "loss off by": off, "steps": entries}


def one_process_world() -> Found:
    """Train under torchrun with one process, by NCCL on a GPU, and without: the same losses."""
    steps, alone = 4, []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node=1", tiny_run.__file__, folder, str(steps), "--model", "both",
                   "--precision", "fp64"]  # fmt: skip
        done = subprocess.run(command, env=os.environ | {"NCCL_DEBUG": "VERSION"}, text=True,
                              capture_output=True, timeout=100)  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    spread = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for kind in ("bevt", "classifier"):
        alone.append([e["loss"] for e in tiny_run.run("", steps, model=kind, precision="fp64")])
    off = float(np.abs(np.array(spread) / np.array(alone) - 1).max())
    used = re.findall(r"NCCL version \S+", done.stdout + done.stderr)[:1]
    return {"right": off < 1e-9, "off by": off, "NCCL told": used}


def resume(tiny: bool) -> Found:
    """Kill a deterministic run, let it go on, and compare all its bits with one nobody killed."""
    steps, kill_after = (6, 2) if tiny else (40, 12)
    words = ["lesson_joint", "--run.deterministic", "--run.stop-after", str(steps),
             "--run.save-every", str(max(1, kill_after // 3)), "--run.keep", "99"]  # fmt: skip
    words += ["--optim.clips", "2", "--optim.images", "2", "--run.threads", "1"] * tiny
    with tempfile.TemporaryDirectory() as place:
        whole, killed = Path(place, "whole"), Path(place, "killed")

        def start(folder: Path) -> subprocess.Popen:
            command = [sys.executable, "-m", "bevt_lib.pretrain", *words]
            return subprocess.Popen([*command, "--run.folder", str(folder)])

        first, second = start(whole), start(killed)
        met = kill_runs.wait_for_lines(killed, kill_after, second)
        second.kill()
        second.wait()
        reached = kill_runs.newest(killed)
        ends = [start(killed).wait(), first.wait()]
        if not met or any(ends):
            raise RuntimeError(f"ended before it was killed, or with status {ends}: see the log")
        files = sorted(p.relative_to(whole) for p in whole.rglob("*.safetensors"))
        same = [(whole / file).read_bytes() == (killed / file).read_bytes() for file in files]
        curves = kill_runs.curve(whole) == kill_runs.curve(killed)
    return {"right": curves and all(same) and len(same) > 2 and 0 < reached < steps,
            "killed after step": reached, "steps": steps, "files": len(files),
            "equal files": sum(same), "equal record": curves}  # fmt: skip


def fp16_ids() -> Found:
    """Give the share of token ids that fp16 changes: the shipped tokenizer on the test stills."""
    stills = tokenizer_scores.stills("test")[0].to(DEVICE)
    tokenizer = load_tokenizer(parts.shipped_tokenizer()).to(DEVICE)
    ids = tokenizer.encode(stills)
    with torch.autocast(DEVICE.type, torch.float16):  # as add_tokens(fp16=True) does on CUDA
        changed = float((tokenizer.encode(stills) != ids).float().mean())
    return {"right": changed < 0.02, "allowed": 0.02, "changed": changed, "ids": ids.numel()}


def machine() -> Found:
    """Say what all this was measured on."""
    cuda = torch.cuda.is_available()
    return {"right": None, "device": torch.cuda.get_device_name() if cuda else "cpu",
            "cores": os.cpu_count(), "python": platform.python_version(),
            "torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}  # fmt: skip
