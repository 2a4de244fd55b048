"""One step: precisions, the scaler, less memory, compiled blocks, and refusals that name items."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from torch._inductor import exc
from torch._inductor.cpp_builder import get_cpp_compiler

from bevt_lib.base.config import Model, Run
from bevt_lib.datasets.video import BadFile
from bevt_lib.model.swin import Swin
from bevt_lib.scoring import cost
from bevt_lib.training import checkpoint, loop, run_folder, step
from bevt_lib.training.loop import TIMINGS, be_deterministic
from bevt_lib.training.task import Task


def losses(history):
    return [entry["loss"] for entry in history]


def test_automatic_precision_follows_the_device(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert step.choose_precision("auto", cpu) == "fp32"
    for capable, expected in ((True, "bf16"), (False, "fp16")):  # A100; V100 and T4

        def supported(including_emulation=True, in_hardware=capable):
            return in_hardware or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert step.choose_precision("auto", gpu) == expected
        assert step.choose_precision("fp32", gpu) == "fp32"
    with pytest.raises(ValueError, match=r"run.precision is one of auto, bf16.*'half'"):
        Run(precision="half")


@pytest.mark.parametrize("name, kind", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_multiplies_in_it_and_keeps_float32_weights(name, kind, monkeypatch):
    seen = []

    def note(module, inputs, output):
        seen.append((module.weight.dtype, output.dtype))

    def watched(seed, model):
        network = genuine(seed, model)
        network.swin.stages[2].blocks[1].mlp.fc1.register_forward_hook(note)
        return network

    genuine = tiny_run.build_model
    exact = losses(tiny_run.run("", 20, precision="fp32"))
    monkeypatch.setattr(tiny_run, "build_model", watched)
    rounded = losses(tiny_run.run("", 20, precision=name))
    assert set(seen) == {(torch.float32, kind)}
    assert rounded[0] != exact[0] and np.isclose(rounded[0], exact[0], rtol=1e-3)
    assert np.mean(rounded[-3:]) < 0.9 * np.mean(rounded[:3])


@pytest.fixture
def large_scale(monkeypatch):
    """A scaler whose first scales overflow."""

    def scaler(device, enabled):
        return genuine(device, enabled=enabled, init_scale=2.0**14, growth_interval=3)

    genuine = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)


def values(history):
    return [{k: v for k, v in e.items() if k not in TIMINGS} for e in history]


def first_step(video: float, image: float) -> dict:
    return tiny_run.run("", 1, loss_weights=(video, image), lr=1e-9, precision="fp64")[0]


def test_losses_are_weighed_by_stream():
    """Gradients are linear in the weights: three of them give the norm of any other."""
    one, other, both = first_step(1, 0), first_step(0, 1), first_step(1, 1)
    a, b, c = (entry["grad_norm"] ** 2 for entry in (one, other, both))
    weighed = first_step(2, 3)
    expected = 4 * a + 9 * b + 6 * (c - a - b)
    assert weighed["grad_norm"] ** 2 == pytest.approx(expected, rel=1e-9)
    assert weighed["loss"] == pytest.approx(2 * one["loss"] + 3 * other["loss"], rel=1e-12)
    assert weighed["video/loss"] == one["loss"] and weighed["image/loss"] == other["loss"]


def test_a_stream_that_is_not_declared_is_refused():
    sources = {"sound": tiny_run.build_sources()["video"]}
    with pytest.raises(ValueError, match=r"must be among video, image, .*got sound"):
        Task(model=tiny_run.build_model(), sources=sources, steps=1, prepare=tiny_run.prepare)


def test_an_overflow_in_fp16_skips_the_step_and_the_scale_is_resumed(large_scale, tmp_path):
    options = {"precision": "fp16", "save_every": 1}
    history = tiny_run.run(str(tmp_path / "whole"), 16, keep=99, **options)
    skipped = [int(e["skipped"]) for e in history]
    assert skipped[0] == 1 and 0 < sum(skipped) < 12
    for entry, left_out in zip(history, skipped, strict=True):
        assert ("grad_norm" in entry) == (not left_out) and np.isfinite(entry["loss"])
    folders = [tmp_path / "whole/checkpoints" / f"step_{n:08d}" for n in range(1, 17)]
    scales = [json.loads((f / "state.json").read_text())["scaler"]["scale"] for f in folders]
    weights = [load_file(f / "model.safetensors")["mask_token"] for f in folders]
    scale = 2.0**14
    for number, left_out in enumerate(skipped):
        grown = scales[number] == 2 * scale and not left_out
        assert scales[number] == scale / 2 if left_out else scales[number] == scale or grown
        if number:
            assert torch.equal(weights[number], weights[number - 1]) == bool(left_out)
        scale = scales[number]
    assert max(scales[i + 1] / scales[i] for i in range(15)) == 2  # after three good steps
    early = skipped.index(0)
    for stop in {1, early + 2}:  # before AdamW has any state, and between two growths
        folder = str(tmp_path / str(stop))
        tiny_run.run(folder, 16, stop_after=stop, **options)
        assert values(tiny_run.run(folder, 16, **options)) == values(history)


def test_a_scale_below_one_is_no_overflow(large_scale, monkeypatch):
    spoil(monkeypatch, from_call=0)
    with pytest.raises(ValueError, match=r"but its gradient (nan|inf) at step 1[5-7], before"):
        tiny_run.run("", 30, precision="fp16")


def spoil(monkeypatch, from_call):
    """Make a gradient infinite from a step on, at finite losses."""
    calls = []

    def build(seed, kind):
        network = genuine(seed, kind)

        def poison(gradient):
            calls.append(1)
            return gradient * (float("inf") if len(calls) > from_call else 1)

        network.mask_token.register_hook(poison)
        return network

    genuine = tiny_run.build_model
    monkeypatch.setattr(tiny_run, "build_model", build)


def test_a_gradient_that_is_not_finite_poisons_no_weight(tmp_path, monkeypatch):
    spoil(monkeypatch, from_call=6)
    with pytest.raises(ValueError, match=r"loss is \d.*, but its gradient inf at step 6, before"):
        tiny_run.run(str(tmp_path), 24)
    found = checkpoint.latest(tmp_path)
    assert found.name == "step_00000004"
    assert all(v.isfinite().all() for v in load_file(found / "model.safetensors").values())
    assert [e["step"] for e in run_folder.read_metrics(tmp_path)] == list(range(6))


@pytest.mark.parametrize("micro", [0, 2])
def test_a_loss_that_is_not_finite_names_its_items(tmp_path, monkeypatch, micro):
    """Of the micro-batch that holds it, and of no other stream, by position and path."""
    prepare = tiny_run.prepare
    entries = [SimpleNamespace(path=Path(f"clips/{i}.mp4")) for i in range(20)]
    monkeypatch.setattr(tiny_run.Arrays, "entries", entries, raising=False)

    def poison(batch, step):
        batch = prepare(batch, step)
        for i, position in enumerate(batch["video"]["position"].tolist()):
            if position == 39:  # of 36 to 41 in step 6
                batch["video"]["pixels"][i] = float("nan")
        return batch

    monkeypatch.setattr(tiny_run, "prepare", poison)
    with pytest.raises(ValueError, match="the loss is nan at step 6, before its update") as caught:
        tiny_run.run(str(tmp_path), 24, micro=micro)
    order = tiny_run.build_sources()["video"].items
    paths = [f"video {p} ({entries[order.index_at(p)[1]].path})" for p in range(36, 42)]
    named = [p for p in paths if p in str(caught.value)]
    assert named == (paths[2:4] if micro else paths) and "image" not in str(caught.value)
    assert checkpoint.latest(tmp_path).name == "step_00000004"


class SomeBad(tiny_run.Arrays):
    """Every seventh clip can't be read."""

    def sample(self, epoch, index):
        if index % 7 == 3 and self.stream == tiny_run.Stream.VIDEO:
            raise BadFile(f"{index}.mp4: broken")
        return super().sample(epoch, index)


def test_replaced_items_are_counted_and_too_many_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_run, "Arrays", SomeBad)
    history = tiny_run.run("", 12, bad_share=0.5)
    order = tiny_run.build_sources()["video"].items
    for entry in history:
        step = int(entry["step"])
        bad = sum(order.index_at(p)[1] % 7 == 3 for p in range(6 * step, 6 * step + 6))
        assert entry["video/replaced"] == bad and entry["image/replaced"] == 0
    total = np.cumsum([e["video/replaced"] for e in history])
    stop = int(np.argmax(total >= 10))  # 3 of 20: more than a hundredth from the start
    tiny_run.run(str(tmp_path), 24, stop_after=4, save_every=1)
    expected = rf"{total[stop]:.0f} of {6 * (stop + 1)} video items .* 1\.00%"
    with pytest.raises(ValueError, match=expected):
        tiny_run.run(str(tmp_path), 24, save_every=1)
    assert checkpoint.latest(tmp_path).name == f"step_{stop:08d}"


def gradients(keep_less, released=False):
    torch.manual_seed(0)
    swin = Swin(
        Model(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window=(2, 2, 2),
              drop_path=0.3, released_quirks=released)
    )  # fmt: skip
    swin.checkpoint_activations = keep_less
    x = torch.randn(3, 2, 8, 8, 8, requires_grad=True)
    noise = torch.rand(3, 2 * swin.num_blocks)
    loss = sum(stage.square().mean() for stage in swin(x, noise))
    kept = cost.kept_bytes(swin, swin, x, noise)
    loss.backward()
    return loss.detach(), [x.grad, *(p.grad for p in swin.parameters())], kept


@pytest.mark.parametrize("released", [False, True])
def test_checkpointed_activations_give_the_same_bits_from_less_memory(released):
    loss, plain, kept = gradients(False, released)
    again, less, kept_less = gradients(True, released)
    assert torch.equal(loss, again) and kept_less < 0.25 * kept
    assert all(torch.equal(a, b) for a, b in zip(plain, less, strict=True))


def test_checkpointed_activations_are_one_switch_of_a_run():
    with_noise = {"model": "classifier", "ema": 0.3}
    plain = tiny_run.run("", 8, **with_noise)
    network, history = tiny_run.train("", 8, checkpoint_activations=True, **with_noise)
    assert network.swin.checkpoint_activations and values(history) == values(plain)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses_and_names(tmp_path):
    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        pytest.skip("no C++ compiler: torch.compile can't be tried on CPU")
    # A process of its own: the compiler's threads and processes stay out of the other tests.
    program = (
        "import tiny_run, torch; "
        f"tiny_run.run({str(tmp_path)!r}, 6, compile=True, stop_after=3, model='classifier'); "
        "assert torch._dynamo.utils.counters['stats']['unique_graphs'] >= 5"
    )
    subprocess.run(
        [sys.executable, "-c", program], stdin=subprocess.DEVNULL, check=True, timeout=600,
        cwd=Path(__file__).parent, env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
    )  # fmt: skip
    names = load_file(checkpoint.latest(tmp_path) / "model.safetensors").keys()
    assert names == tiny_run.build_model(kind="classifier").state_dict().keys()
    history = tiny_run.run(str(tmp_path), 6, model="classifier")  # and on without
    plain = tiny_run.run("", 6, model="classifier")
    assert np.allclose(losses(history), losses(plain), rtol=1e-4)
    assert np.allclose(losses(history)[:2], losses(plain)[:2], rtol=1e-6)
    shutil.rmtree(tmp_path)


def test_deterministic_is_one_switch(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        be_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert loop.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert values(tiny_run.run("", 4)) == values(tiny_run.run("", 4))
    finally:
        be_deterministic(False)
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_a_log_file_gets_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(run_folder, "LINE_EVERY", 0.0)
    tiny_run.run("", 5)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == ("steps 0 to 5 in 1 process(es) x 1 micro-batch(es) of 6 video + 12 image; "
                        "fp32")  # fmt: skip
    assert len(lines) == 6 and "\r" not in "".join(lines)
    for number, line in enumerate(lines[1:], 1):
        assert line.startswith(f"step {number} of 5: loss ") and line.endswith(" left")
        assert all(word in line for word in (", lr ", " items/s, ", "% of it waiting for data"))
    monkeypatch.setattr(run_folder, "LINE_EVERY", 1000.0)
    tiny_run.run("", 5)
    assert len(capsys.readouterr().err.splitlines()) == 1
