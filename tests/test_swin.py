"""Video Swin against independent implementations: timm in 2D, torchvision in 3D, slow windows."""

import bevt_lib  # isort: skip  # noqa: F401  # its guard must run before torchvision is imported

import pytest
import timm
import torch
import torchvision

from bevt_lib.model.bevt import BEVT
from bevt_lib.model.classifier import Classifier
from bevt_lib.model.swin import PatchMerging, bias_index, join_windows, shift_mask, split_windows

SMALL = {"embed_dim": 24, "depths": (1, 2, 3, 1), "num_heads": (2, 4, 6, 8)}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1


def central_slice(table: torch.Tensor, window) -> torch.Tensor:
    """The rows of a 3D bias table with zero temporal offset: the 2D table inside it."""
    d, h, w = window
    return table.view(2 * d - 1, (2 * h - 1) * (2 * w - 1), -1)[d - 1]


@pytest.mark.parametrize("side", [224, 112])
def test_the_clean_image_path_is_timms_2d_swin(side):
    window = (8, 7, 7)
    ours = BEVT(vocab_size=4, window=window, **SMALL, streams=("image",))
    randomise(ours)
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224", pretrained=False, img_size=side, num_classes=0,
        embed_dim=SMALL["embed_dim"], depths=SMALL["depths"], num_heads=SMALL["num_heads"],
        window_size=7,
    )  # fmt: skip
    state = {}
    for name, value in ours.state_dict().items():
        if name.startswith("swin.stages."):
            name = name.replace("swin.stages.", "layers.")
            if "bias_table" in name:
                name = name.replace("bias_table", "relative_position_bias_table")
                value = central_slice(value, window)
            if "downsample" in name:  # timm merges on entering a stage, we on leaving one
                layer = int(name.split(".")[1])
                name = name.replace(f"layers.{layer}.", f"layers.{layer + 1}.")
            state[name] = value
        elif name.startswith("patch_embed.image."):
            key = name.replace("patch_embed.image.", "patch_embed.")
            state[key] = value[:, :, 0] if key.endswith("proj.weight") else value
        elif name.startswith("norm."):
            state[name] = value
    own = theirs.state_dict()
    assert set(state) == {k for k in own if not k.endswith(("index", "mask"))}
    for name, value in state.items():  # timm shrinks the tables of small maps itself
        assert value.shape == own[name].shape or "bias_table" in name
    if side == 112:  # stage 4 is a 4x4 map there: a smaller window, other tables
        for stage in (ours.swin.stages[3],):
            for block in stage.blocks:
                block.attn.bias_table.data.zero_()
        for name in [n for n in state if n.startswith("layers.3.") and "bias_table" in n]:
            state[name] = torch.zeros_like(own[name])
    theirs.load_state_dict(state, strict=False)
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.eval().forward_features(pixels)
        mine = ours.norm(ours.swin(ours.patch_embed["image"](pixels[:, :, None]))[-1])[:, 0]
    assert torch.allclose(mine, expected, atol=2e-5), (mine - expected).abs().max()


@pytest.mark.parametrize("size", [(16, 112, 112), (9, 70, 90)])
def test_the_released_classifier_path_is_torchvisions_swin3d(size):
    window = (8, 7, 7)
    ours = Classifier(num_classes=5, window=window, **SMALL, released_quirks=True)
    randomise(ours)
    theirs = torchvision.models.video.swin_transformer.SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=SMALL["embed_dim"], depths=list(SMALL["depths"]),
        num_heads=list(SMALL["num_heads"]), window_size=list(window), num_classes=5,
        norm_layer=torch.nn.LayerNorm,
        patch_embed=torchvision.models.video.swin_transformer.PatchEmbed3d,
    )  # fmt: skip
    state = {}
    for name, value in ours.state_dict().items():
        if name.startswith("swin.stages."):
            _, _, stage, *rest = name.split(".")
            rest = ".".join(rest)
            place = 2 * int(stage) + rest.startswith("downsample")
            rest = rest.removeprefix("blocks.").removeprefix("downsample.")
            rest = rest.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
            rest = rest.replace("bias_table", "relative_position_bias_table")
            name = f"features.{place}.{rest}"
        state[name] = value
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all(k.endswith("index") for k in missing)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(ours.logits(pixels), theirs.eval()(pixels), atol=2e-5)


def test_an_image_is_a_one_frame_clip():
    """With equal weights the image path equals the video path at one time step, exactly."""
    model = BEVT(vocab_size=4, window=(4, 3, 3), **SMALL)
    randomise(model)
    x = torch.randn(2, 1, 12, 18, SMALL["embed_dim"])
    as_clip = torch.cat([x, torch.zeros_like(x)], dim=1)
    outputs = model.swin(x)
    assert [o.shape[1] for o in outputs] == [1] * 4
    assert [o.shape[1] for o in model.swin(as_clip)] == [2] * 4
    assert torch.equal(model.swin(torch.cat([x, x]))[3][:2], model.swin(x)[3]) or torch.allclose(
        model.swin(torch.cat([x, x]))[3][:2], model.swin(x)[3], atol=1e-6
    )


def test_windows_come_apart_and_together():
    x = torch.randn(2, 4, 6, 9, 5)
    windows = split_windows(x, (2, 3, 3))
    assert torch.equal(windows[7].view(2, 3, 3, 5), x[0, 2:4, 0:3, 3:6])
    assert torch.equal(join_windows(windows, (2, 3, 3), (4, 6, 9)), x)


def test_bias_index_agrees_with_a_slow_loop():
    window, table = (2, 3, 2), (4, 5, 3)
    index = bias_index(window, table)
    places = [(d, h, w) for d in range(2) for h in range(3) for w in range(2)]
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            row = (a[0] - b[0] + 3) * 9 * 5 + (a[1] - b[1] + 4) * 5 + (a[2] - b[2] + 2)
            assert index[i, j] == row


def test_shift_mask_keeps_apart_what_was_not_adjacent():
    """Slow version: after rolling back, two tokens see each other if neither wrapped alone."""
    padded, window, shift = (4, 6, 6), (2, 3, 3), (1, 1, 1)
    mask = shift_mask(padded, window, shift)
    place = torch.stack(torch.meshgrid(*(torch.arange(s) for s in padded), indexing="ij"), -1)
    wrapped = torch.stack(
        [place[..., a] >= padded[a] - shift[a] for a in range(3)], -1
    )  # after the roll, these places hold tokens from the other end
    windows = split_windows(wrapped[None].float(), window)
    for w in range(len(windows)):
        together = (windows[w][:, None] == windows[w][None]).all(-1)
        assert torch.equal(mask[w] == 0, together)


def test_merging_takes_neighbours_in_the_released_order():
    layer = PatchMerging(1)
    layer.norm, layer.reduction = torch.nn.Identity(), torch.nn.Identity()
    x = torch.arange(4.0).view(1, 1, 2, 2, 1)
    assert layer(x).flatten().tolist() == [0, 2, 1, 3]


def test_stochastic_depth_is_unbiased_and_keyed_by_its_noise():
    model = Classifier(num_classes=3, window=(2, 3, 3), drop_path=0.5, **SMALL)
    pixels = torch.randn(4, 3, 4, 32, 32)
    noise = torch.rand(4, model.noise_sizes["clip"])
    assert torch.equal(model.logits(pixels, noise), model.logits(pixels, noise))
    assert torch.allclose(
        model.logits(pixels, noise)[1:], model.logits(pixels[1:], noise[1:]), atol=1e-6
    )
    assert not torch.allclose(model.logits(pixels, noise), model.logits(pixels))
    assert torch.allclose(
        model.logits(pixels, torch.ones_like(noise) * 0.999).isfinite().float(), torch.ones(4, 3)
    )


@pytest.mark.parametrize("side", [112, 48])
def test_sizes_with_an_odd_stage_3_are_refused_with_the_fix(side):
    model = BEVT(vocab_size=4, window=(2, 3, 3), **SMALL)
    with pytest.raises(ValueError, match="multiples of 32 px"):
        model.features("video", torch.randn(1, 3, 4, side, side))


@pytest.mark.parametrize("side", [64, 96, 128, 160])
def test_sizes_the_method_allows_work(side):
    model = BEVT(vocab_size=4, window=(2, 3, 3), **SMALL)
    assert model.features("image", torch.randn(1, 3, 1, side, side)).shape[1:4] == (
        1, side // 16, side // 16,
    )  # fmt: skip


def test_the_released_image_path_refuses_sizes_that_do_not_fit_its_window():
    model = BEVT(vocab_size=4, window=(8, 7, 7), released_quirks=True, **SMALL)
    with pytest.raises(ValueError, match="224"):
        model.features("image", torch.randn(1, 3, 1, 128, 128))


def test_the_clean_and_the_released_image_path_differ_as_measured():
    """The released mask in every block changes the output; without it they would be equal."""
    clean = BEVT(vocab_size=4, window=(8, 7, 7), **SMALL, streams=("image",))
    released = BEVT(
        vocab_size=4, window=(8, 7, 7), released_quirks=True, **SMALL, streams=("image",)
    )
    released.load_state_dict(clean.state_dict())
    pixels = torch.randn(1, 3, 1, 224, 224)
    with torch.no_grad():
        gap = (clean.features("image", pixels) - released.features("image", pixels)).abs().mean()
    assert gap > 1e-3
