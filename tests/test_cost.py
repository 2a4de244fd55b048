"""What a plan says of cost, against the released models' counts, allocators and hand counts."""

import json
import re
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from golden_numbers import CASES, FOLDER, arrays
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from bevt_lib import parts, presets
from bevt_lib.base import onednn
from bevt_lib.model.classifier import Classifier
from bevt_lib.model.masking import tube_mask
from bevt_lib.model.swin import Block
from bevt_lib.scoring import cost
from bevt_lib.tokenizers.dalle import DalleTokenizer, build
from bevt_lib.training import loop
from bevt_lib.weights.formats import released_name

COUNTS = json.loads((FOLDER / CASES["counts"]).read_text()) if "counts" in CASES else {}
SMALL = {"embed_dim": 24, "depths": (1, 2, 3, 1), "num_heads": (1, 2, 4, 8), "window": (4, 3, 3)}


def on_meta(name: str):
    """The paper's model of a golden entry, without values."""
    with torch.device("meta"):
        if name == "pretrain":
            return parts.build_bevt(presets.paper_joint())
        return parts.build_classifier(presets.FINETUNE[f"paper_{name}"]())


@pytest.fixture(scope="module")
def dalle():
    with torch.device("meta"):
        return DalleTokenizer(*build(256, 2, 8192))


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_the_released_models(name, dalle, parity):
    """All but num_state_dict_entries: there, each block's bias index is a buffer beside them."""
    model, golden = on_meta(name), COUNTS[name]
    sizes = {released_name(k): p.numel() for k, p in model.named_parameters()}
    frozen = {f"cls_head.vae_encoder.{k}": p.numel() for k, p in dalle.encoder.named_parameters()}
    if name == "pretrain":
        sizes |= frozen

    def under(*starts: str) -> int:
        return sum(n for k, n in sizes.items() if k.startswith(starts))

    layers = [under(f"backbone.layers.{i}.") for i in range(4)]
    mine = {
        "total_parameters": sum(sizes.values()),
        "backbone": under("backbone."),
        "head": under("cls_head."),
        "backbone_children": {c: under(f"backbone.{c}.") for c in golden["backbone_children"]},
        "backbone_own": {c: under(f"backbone.{c}") for c in golden["backbone_own"]},
        "layers": layers,
        "rel_pos_bias_total": sum(n for k, n in sizes.items() if "bias_table" in k),
        "num_parameters_tensors": len(sizes),
    }
    if name == "pretrain":
        mine |= {
            "vae_encoder": sum(frozen.values()),
            "lm_head": under("cls_head.lm_head."),
            "total_without_vae": cost.parameters(model),
        }
    assert {k: golden[k] for k in mine} == mine
    parity("i parameters", abs(golden["total_parameters"] - mine["total_parameters"]), 0)
    left = {k for k in golden if k not in mine and not k.startswith("flops")}
    assert left == {"num_state_dict_entries"}
    children = mine["backbone_children"] | mine["backbone_own"]
    assert sum(children.values()) == mine["backbone"]  # every parameter has its counterpart


FORWARDS = [(name, key) for name, case in COUNTS.items() for key in case if "flops" in key]


@pytest.mark.parametrize("name, key", FORWARDS)
def test_multiply_adds_are_the_released_models(name, key, dalle, parity):
    """By operation, exactly; PyTorch counts all convolutions as one."""
    model, golden = on_meta(name), COUNTS[name][key]
    *frames, height, width = map(int, re.findall(r"\d+", key))
    frames = frames[0] if frames else 1
    pixels = cost.empty(1, 3, frames, height, width)
    if "tokenizer" in key:
        view = cost.empty(frames, height, width, 3, dtype=torch.uint8)
        found = cost.count(dalle.logits, view)
    elif name == "pretrain":
        stream = "image" if "image" in key else "video"
        found = cost.count(model.features, stream, pixels)
        if "lmhead" in key:
            found = cost.count(lambda: model.token_head(model.features(stream, pixels)))
    else:
        found = cost.count(model.logits, pixels)
    assert found.by_op == golden["by_op"]
    parity("i multiply-adds", abs(found.total - golden["multiply_adds_total"]), 0)


@pytest.mark.skipif("k400" not in COUNTS, reason="other golden numbers")
@pytest.mark.parametrize("name, figure", [("k400", 281_922_895_872), ("ssv2", 320_945_944_576)])
def test_the_papers_figures_hold_the_norms(name, figure):
    """fvcore 0.1.5 on the released models (MANIFEST, section i); the paper: 282 G and 321 G."""
    assert cost.count(on_meta(name).logits, cost.empty(1, 3, 32, 224, 224)).fvcore == figure


def small(device: str):
    """A small classifier and the (pixels, noise) of a micro-batch of three."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Classifier(num_classes=5, drop_path=0.2, dropout=0.5, **SMALL)
        return model, torch.rand(3, 3, 8, 96, 96), torch.rand(3, model.noise_sizes["clip"])


@pytest.mark.parametrize("autocast", [False, True])
def test_kept_bytes_are_what_the_allocator_still_holds(autocast, monkeypatch):
    """PyTorch's profiler counts what the CPU allocator gave and got back, whatever for."""
    monkeypatch.setattr(onednn, "X86", False)  # as on a GPU

    def forward(model, pixels, noise):
        if not autocast:
            return model.logits(pixels, noise)
        with cost.Bf16() as casts:
            return model.logits(pixels, noise), casts

    model, *batch = small("cpu")
    forward(model, *batch)  # window plans stay cached: they are no part of it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = forward(model, *batch)
    allocated = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    kept = cost.kept_bytes(model, forward, model, *batch)
    del held
    assert kept == pytest.approx(allocated, rel=0.005)
    shapes, *batch = small("meta")
    assert kept == cost.kept_bytes(shapes, forward, shapes, *batch)


def test_a_block_under_autocast_keeps_what_a_hand_count_says():
    dim, heads, tokens = 64, 2, 2 * 8 * 8
    window, clips = 2 * 4 * 4, 3
    with torch.device("meta"):
        block = Block(dim, heads, (2, 4, 4), shifted=False, drop_path=0.0, released_quirks=False)
    x = cost.empty(clips, 2, 8, 8, dim).requires_grad_()
    with cost.Bf16():
        kept = cost.kept_bytes(block, lambda: block(x, None).sum())
    norm = 4 * dim + 8  # float32 input, mean and spread
    softmax = (4 + 2) * heads * window  # its float32 result and the bf16 copy
    attention = 2 * dim + 3 * 2 * dim + softmax + 2 * dim  # in, q k v, out
    mlp = 2 * dim + 2 * 4 * dim + 2 * 4 * dim  # in, before and after the GELU
    weights = 2 * 12 * dim * dim  # bf16 copies: 3, 1, 4 and 4 squares
    index = 8 * window * window
    hand = clips * tokens * (2 * norm + attention + mlp) + weights + index
    assert kept == pytest.approx(hand, rel=0.002)


def test_every_operation_that_autocast_casts_is_cast():
    """PyTorch's own list for CUDA, which also builds without CUDA hold."""
    listed = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    names = {name.removeprefix("aten::").partition(".")[0] for name in listed}
    seen = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.add(func)
            return func(*args, **(kwargs or {}))

    recipe = presets.lesson_joint()
    with torch.device("meta"):
        model = parts.build_bevt(recipe)
        tokenizer = DalleTokenizer(*build(8, 1, recipe.tokens.vocab_size))
    losses = [cost.token_item(recipe, model, tokenizer, s).loss for s in recipe.streams]
    classifier, *batch = small("meta")
    with Watch():
        losses[0](2), losses[1](2), classifier.logits(*batch)
    cast = {f for f in seen if f.__name__.strip("_") in names}
    assert {f.__name__ for f in cast} >= {
        "linear", "conv3d", "conv_transpose3d", "matmul", "layer_norm", "softmax",
    }  # fmt: skip
    assert cast <= {*cost.Bf16.DOWN, *cost.Bf16.UP}


@pytest.mark.parametrize("case", CASES.get("masking", []), ids=lambda c: c["file"])
def test_the_expected_hidden_places_are_the_released_mean(case):
    frames, side, per_step = case["clip_len"], case["input_size"], case["temporal_scale"]
    expected = cost.hidden_places(
        case["num_masking_patches"], frames // per_step, case["masked_tube_range"], per_step
    )
    mean = float(arrays(case["file"])["mean_ratio"]) * frames * side * side
    assert expected == pytest.approx(mean, rel=0.01)


def test_the_expected_hidden_places_are_the_drawn_ones():
    tube = presets.lesson_joint().masking.tube
    drawn = [tube_mask((4, 6, 6), Random(i), length=tube) for i in range(400)]
    hidden, frames = (
        2 * np.mean([m.sum() for m in drawn]),
        2 * np.mean([m.any((1, 2)).sum() for m in drawn]),
    )
    assert cost.hidden_places(18, 4, tube, 2) == pytest.approx(hidden, rel=0.02)
    assert cost.hidden_places(1, 4, tube, 2) == pytest.approx(frames, rel=0.02)


@pytest.fixture(scope="module")
def joint(dalle):
    recipe = presets.paper_joint()
    model = on_meta("pretrain")
    return recipe, model, {s: cost.token_item(recipe, model, dalle, s) for s in recipe.streams}


def test_the_hours_of_joint_pretraining_by_hand(joint, dalle):
    """150 epochs of 240,000 clips, eight images with each; figures of the released models, in G."""
    recipe, model, items = joint
    clip, image = 148.065 + 0.375 * 26.307, 15.944 + 0.5 * 1.644
    student, naming = 3 * (clip + 8 * image), (0.75 * 16 + 8) * 26.059
    seconds = 150 * 240_000 * (student / 0.07 + naming / 0.25) * 1e9 * 2 / 312e12
    recipe = replace(recipe, run=replace(recipe.run, processes=32))
    lines = cost.describe(recipe, model, items, dalle)
    hours = float(lines["GPU-hours"].split()[0].replace(",", ""))
    assert hours == pytest.approx(seconds / 3600, rel=1e-3)
    assert lines["tokens a step"].startswith("12,845,056 patches in, 1,003,520 ids named")


def test_memory_follows_the_micro_batch_the_world_and_the_average(joint):
    recipe, model, items = joint

    def parts(processes, micro, ema=0.0):
        split = loop.split_batch(recipe.batches, processes, micro)
        changed = replace(recipe, optim=replace(recipe.optim, ema=ema))
        return list(cost.memory(changed, model, items, split).values())

    alone, together, averaged = parts(1, 2), parts(2, 2), parts(2, 2, ema=0.1)
    weights = 4 * 109_679_048
    assert alone[0] == 4 * weights and together[0] == 5 * weights and averaged[0] == 6 * weights
    assert alone[1] == together[1]
    half, whole = parts(1, 1)[1], alone[1]
    copies = weights / 2  # in bf16, whatever the batch
    assert whole - copies == pytest.approx(2 * (half - copies), rel=0.01)


def test_planning_leaves_real_runs_alone():
    model, *batch = small("cpu")
    with torch.no_grad():
        before = model.logits(*batch)
        shapes, *without_values = small("meta")
        cost.count(shapes.logits, *without_values)
        assert torch.equal(model.logits(*batch), before)
