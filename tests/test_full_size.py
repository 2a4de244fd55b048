"""One real optimiser step of ``paper_joint`` at full size, on the CPU: about a minute and 5 GB."""

import numpy as np
import pytest
import torch
from PIL import Image

from bevt_lib import parts, pretrain
from bevt_lib.cli import parse
from bevt_lib.datasets.video import write_video
from bevt_lib.presets import paper_image, paper_joint
from bevt_lib.tokenizers.dalle import DalleTokenizer, build
from bevt_lib.weights.load import load_model, read_weights, save_weights


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """DALL-E's whole architecture with random weights, an image stream's, one clip, one picture."""
    folder = tmp_path_factory.mktemp("full")
    torch.manual_seed(0)
    DalleTokenizer(*build(256, 2, 8192)).save(folder / "tokenizer.safetensors")
    image_stream = parts.build_bevt(paper_image())
    save_weights(image_stream.state_dict(), folder / "image_stream.safetensors")
    picture = np.random.default_rng(0).integers(0, 256, (256, 340, 3), dtype=np.uint8)
    write_video(folder / "clip.mp4", np.stack([np.roll(picture, i, 1) for i in range(130)]))
    (folder / "list.txt").write_text("clip.mp4 0\n")
    (folder / "images" / "n01440764").mkdir(parents=True)
    Image.fromarray(picture).save(folder / "images" / "n01440764" / "a.JPEG")
    return folder


@pytest.mark.slow
def test_one_step_at_full_size_moves_every_parameter(files):
    recipe = parse(paper_joint(), [
        "--data.video-list", str(files / "list.txt"), "--data.video-root", str(files),
        "--data.image-root", str(files / "images"), "--data.workers", "0",
        "--tokens.weights", str(files / "tokenizer.safetensors"),
        "--run.init", str(files / "image_stream.safetensors"), "--run.folder", str(files / "run"),
        "--optim.clips", "1", "--optim.images", "1",
        "--run.micro-batch", "1", "--run.stop-after", "1",
        "--model.drop-path", "0",  # else whole blocks are left out of a batch of one
    ])  # fmt: skip
    before = parts.build_bevt(recipe)
    report = parts.initialise_bevt(recipe, before)
    assert "332 taken, 4 inflated, 8 fresh" in report
    model, history = pretrain.train(recipe)
    assert sum(p.numel() for p in model.parameters()) == 109_679_048
    assert model.swin.stages[2].blocks[0].window == (8, 7, 7) and recipe.data.size == 224
    # Random weights know nothing: ln 8192 = 9.0 nats, give or take the head's random logits.
    for stream in ("video", "image"):
        assert 7 < history[0][f"{stream}/loss"] < 11, history
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
        assert not torch.equal(parameter, before.get_parameter(name)), name
    table = model.swin.stages[3].blocks[0].attn.bias_table.grad
    assert (table.abs().sum(1) > 0).all()  # the 8x7x7 map is one window: every offset occurs
    saved = read_weights(files / "run" / "checkpoints" / "step_00000001")
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
    model.save_pretrained(files / "model")
    assert torch.equal(load_model(files / "model").mask_token, model.mask_token)
