"""Weights: released numbers, other codes' models on the same weights, safe files, model folders."""

import bevt_lib  # isort: skip  # noqa: F401  # its guard must run before torchvision is imported

import argparse
import collections
import json
import math
import os
import pickle

import numpy as np
import pytest
import timm
import torch
import torchvision
from golden_numbers import CASES, FOLDER, arrays, rule_weight

from bevt_lib import parts
from bevt_lib.base.config import ClipSpec
from bevt_lib.convert_weights import convert
from bevt_lib.model import classifier
from bevt_lib.model.bevt import BEVT
from bevt_lib.model.classifier import Classifier
from bevt_lib.presets import FINETUNE, PRETRAIN, lesson_image, lesson_joint
from bevt_lib.tokenizers.dalle import build
from bevt_lib.weights.formats import architecture, export, recognise, released_name, window_of
from bevt_lib.weights.load import (
    load_model,
    load_strict,
    read_checkpoint,
    read_file,
    read_weights,
    resize_table,
    save_weights,
    start_classifier,
    start_pretraining,
)

SMALL = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)}


def golden_json(key: str) -> dict:
    return json.loads((FOLDER / CASES[key]).read_text()) if key in CASES else {}


def filled(state: dict, scale: float, *, prefix: str = "") -> dict[str, torch.Tensor]:
    """Fill released names by the MANIFEST's rule."""
    return {
        name: torch.from_numpy(rule_weight(prefix + name, value.shape, scale))
        for name, value in state.items()
    }


def released_state(model) -> dict[str, torch.Tensor]:
    state, _ = export(model.state_dict(), "bevt")
    return {k: v for k, v in state.items() if not k.endswith("index")}


def fill(model, scale: float) -> None:
    load_strict(model, recognise(filled(released_state(model), scale)).state, "rule")


def assert_like_released(model, tensors: dict, parity) -> int:
    """Every tensor of the golden backbone, by its statistics and single values."""
    mine = {k.removeprefix("backbone."): v for k, v in released_state(model).items()
            if k.startswith("backbone.")}  # fmt: skip
    assert mine.keys() == tensors.keys()
    for name, golden in tensors.items():
        flat = mine[name].double().flatten()
        assert list(mine[name].shape) == golden["shape"], name
        stats = [flat.mean(), flat.std(correction=0), flat.norm(), *flat[:4], flat[len(flat) // 2],
                 flat[-1]]  # fmt: skip
        told = [golden["mean"], golden["std"], golden["l2"], *golden["first"], golden["mid"],
                golden["last"]]  # fmt: skip
        off = np.abs(np.subtract([float(s) for s in stats], told)) / np.maximum(1, np.abs(told))
        parity("e started weights", off.max(), 1e-6, name)
    return len(tensors)


def keys_in(message: str, kind: str) -> set[str]:
    """Read the released loader's own list of missing or unexpected keys, index buffers aside."""
    listed = message.split(f"{kind}_keys=[")[1].split("]")[0]
    return {k for k in (w.strip(" '") for w in listed.split(",")) if k and not k.endswith("index")}


def swin2d(config: dict) -> dict[str, torch.Tensor]:
    """A 2D checkpoint as the MANIFEST describes it."""
    dim, depths, heads = config["embed_dim"], config["depths"], config["num_heads"]
    shapes = {"patch_embed.proj.weight": (dim, 3, 4, 4), "patch_embed.proj.bias": (dim,),
              "patch_embed.norm.weight": (dim,), "patch_embed.norm.bias": (dim,)}  # fmt: skip
    for s, depth in enumerate(depths):
        d = dim * 2**s
        for b in range(depth):
            at = f"layers.{s}.blocks.{b}."
            for part, shape in {"norm1.weight": (d,), "norm1.bias": (d,), "norm2.weight": (d,),
                                "norm2.bias": (d,), "attn.qkv.weight": (3 * d, d),
                                "attn.qkv.bias": (3 * d,), "attn.proj.weight": (d, d),
                                "attn.proj.bias": (d,), "mlp.fc1.weight": (4 * d, d),
                                "mlp.fc1.bias": (4 * d,), "mlp.fc2.weight": (d, 4 * d),
                                "mlp.fc2.bias": (d,)}.items():  # fmt: skip
                shapes[at + part] = shape
            rows = (2 * config["window2d"] - 1) ** 2
            shapes[at + "attn.relative_position_bias_table"] = (rows, heads[s])
        if s < 3:
            at = f"layers.{s}.downsample."
            shapes |= {at + "reduction.weight": (2 * d, 4 * d), at + "norm.weight": (4 * d,),
                       at + "norm.bias": (4 * d,)}  # fmt: skip
    last = 8 * dim
    shapes |= {"norm.weight": (last,), "norm.bias": (last,), "head.weight": (10, last),
               "head.bias": (10,)}  # fmt: skip
    if config["extras"]:
        shapes |= {"fc_norm.weight": (last,), "fc_norm.bias": (last,), "mask_token": (1, 1, dim),
                   "lm_down.weight": (last, last * 3 // 2), "lm_down.bias": (last,),
                   "fpn.0.weight": (last, last, 2, 2), "fpn.0.bias": (last,)}  # fmt: skip
    return {
        name: torch.from_numpy(rule_weight(f"2d.{name}", shape, config["scale"]))
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("name", golden_json("inflate"))
def test_a_2d_checkpoint_is_inflated_as_released(name, tmp_path, parity):
    case = golden_json("inflate")[name]
    config = case["config"]
    shape = {k: tuple(config[k]) for k in ("depths", "num_heads")}
    shape |= {"embed_dim": config["embed_dim"], "window": tuple(config["window3d"])}
    joint = config["which"] == "SwinTransformerBEVT"
    model = BEVT(vocab_size=4, **shape) if joint else Classifier(num_classes=4, **shape)
    fill(model, config["scale"])
    flat = {config["key_prefix"] + k: v for k, v in swin2d(config).items()}
    torch.save({config["wrapped_in"]: flat}, tmp_path / "2d.pth")
    found = read_checkpoint(tmp_path / "2d.pth")
    assert found.format == "swin"
    report = (start_pretraining if joint else start_classifier)(model, found.state)
    assert assert_like_released(model, case["tensors"], parity) >= 80
    told = {released_name(n).removeprefix("backbone.") for n in report.fresh if "head" not in n}
    assert told == keys_in(case["load_message"], "missing")
    # The released loader copies fc_norm over norm and then finds fc_norm left over.
    left_out = {released_name(n).removeprefix("backbone.") if n.startswith("decoder.") else n
                for n in report.left_out}  # fmt: skip
    mine = {n.replace("norm.", "fc_norm.") for n in found.left_out} | left_out
    assert mine == keys_in(case["load_message"], "unexpected")


@pytest.mark.skipif("bevt_to_classifier" not in CASES, reason="no such numbers in this folder")
def test_a_joint_checkpoint_starts_a_classifier_of_another_window_as_released(parity):
    case = golden_json("bevt_to_classifier")
    config = case["config"]
    shape = {"embed_dim": config["embed_dim"], "depths": tuple(config["depths"]),
             "num_heads": tuple(config["num_heads"])}  # fmt: skip
    joint = BEVT(vocab_size=16, window=tuple(config["pretrain_window"]), **shape)
    model = Classifier(num_classes=4, window=tuple(config["finetune_window"]), **shape)
    fill(joint, config["scale"])
    tokenizer = {"conv.weight": torch.zeros(16, 3, 8, 8), "conv.bias": torch.zeros(16)}
    state, _ = export(joint.state_dict(), "bevt", tokenizer)
    found = recognise({"state_dict": state, "meta": {"epoch": 1}})
    report = start_classifier(model, found.state)
    assert assert_like_released(model, case["tensors"], parity) >= 80
    resized = {released_name(n).removeprefix("backbone.") for n in report.resized}
    assert resized == {line.split()[-1] for line in case["log"] if line.startswith("interpolate")}
    left = {released_name(n) for n in report.left_out}
    left |= {f"cls_head.vae_encoder.{k}" for k in found.tokenizer}
    unexpected = keys_in(case["log"][-1], "unexpected")
    assert left == {k if k.startswith("cls_head") else f"backbone.{k}" for k in unexpected}


@pytest.mark.skipif("resized_bias_table" not in CASES, reason="no such numbers in this folder")
def test_a_bias_table_is_resized_as_released(parity):
    config = golden_json("bevt_to_classifier")["config"]
    golden = arrays(CASES["resized_bias_table"])
    old, new = tuple(config["pretrain_window"]), tuple(config["finetune_window"])
    for name in golden:
        shape = (math.prod(2 * w - 1 for w in old), golden[name].shape[1])
        table = torch.from_numpy(rule_weight(f"backbone.{name}", shape, config["scale"]))
        off = np.abs(resize_table(table, old, new).numpy() - golden[name]).max()
        parity("e resized bias table", off, 1e-6)


PRESETS = {"pretrain": "paper_joint", "k400": "paper_k400", "ssv2": "paper_ssv2"}


@pytest.mark.parametrize("file", CASES.get("state_dicts", []))
def test_full_size_state_dicts_have_the_released_names_and_shapes(file, parity):
    listed = json.loads((FOLDER / file).read_text())
    name = PRESETS[file.removeprefix("j_state_dict_").removesuffix(".json")]
    with torch.device("meta"):
        if name == "paper_joint":
            model = parts.build_bevt(PRETRAIN[name]())
        else:
            model = parts.build_classifier(FINETUNE[name]())
    tokenizer = {}
    if name == "paper_joint":
        encoder, _ = build(256, 2, 8192)
        tokenizer = encoder.state_dict()
    state, left = export(model.state_dict(), "bevt", tokenizer)
    mine = {k: (list(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in state.items()}
    expected = {row["name"]: (row["shape"], row["dtype"]) for row in listed}
    assert not left
    differing = set(map(str, mine.items())) ^ set(map(str, expected.items()))
    parity("j names, shapes, dtypes", len(differing), 0, str(sorted(differing)[:2]))


def test_weights_that_do_not_fit_name_their_keys(tmp_path):
    image = parts.build_bevt(lesson_image())
    joint = parts.build_bevt(lesson_joint())
    with pytest.raises(ValueError, match=r"a file: .*missing .*decoder\.video"):
        load_strict(joint, image.state_dict(), "a file")
    state = image.state_dict()
    state["norm.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"norm\.weight has shape \(3,\), expected \(192,\)"):
        load_strict(image, state, "a file")
    (tmp_path / "w.safetensors").write_text("<html>")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        read_weights(tmp_path / "w.safetensors")


def test_weights_survive_a_file(tmp_path):
    model = parts.build_bevt(lesson_image())
    save_weights(model.state_dict(), tmp_path / "w.safetensors")
    again = read_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())
    save_weights(model.state_dict(), tmp_path / "small.safetensors", torch.float8_e4m3fn)
    small = read_weights(tmp_path / "small.safetensors")
    for name, value in model.state_dict().items():
        assert torch.allclose(small[name].float(), value, rtol=0.07, atol=2e-3), name


def official(tmp_path, *, wrapped=True, prefix="", tokenizer=True):
    """A checkpoint in the shape mmcv writes, and its state dict: all the released names."""
    model = BEVT(vocab_size=16, window=(4, 3, 3), **SMALL)
    encoder = {"blocks.output.conv.w": torch.zeros(16, 8, 1, 1)} if tokenizer else {}
    named, _ = export(model.state_dict(), "bevt", encoder)
    state = collections.OrderedDict(
        (prefix + k, v if "index" in k else torch.from_numpy(rule_weight(k, v.shape, 0.05)))
        for k, v in named.items()
    )
    content = {
        "meta": {"epoch": 150, "iter": np.int64(7), "hook_msgs": {"best": np.float64(0.8)},
                 "config": "total_epochs = 150", "seed": np.random.default_rng(0).random(3),
                 "args": argparse.Namespace(gpus=8)},
        "state_dict": state,
        "optimizer": {"state": {0: {"step": np.float32(3), "exp_avg": torch.zeros(2)}},
                      "param_groups": [{"lr": 5e-4, "betas": (0.9, 0.999), "params": [0]}]},
        "amp": {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 3}},
    }  # fmt: skip
    torch.save(content if wrapped else state, tmp_path / "official.pth")
    return {k.removeprefix(prefix): v for k, v in state.items()}


@pytest.mark.parametrize("tokenizer", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_to_ours_to_official_is_exact(tmp_path, prefix, tokenizer):
    """Through the command's own folders and files, index buffers and tokenizer included."""
    state = official(tmp_path, prefix=prefix, tokenizer=tokenizer)
    table = convert(tmp_path / "official.pth", tmp_path / "model")
    assert "rebuilt from the window" in table and "window (4, 3, 3)" in table
    convert(tmp_path / "model", tmp_path / "again.pth", "bevt")
    again = torch.load(tmp_path / "again.pth", weights_only=True)["state_dict"]
    assert again.keys() == state.keys()
    assert all(torch.equal(v, again[k]) and v.dtype == again[k].dtype for k, v in state.items())
    ours = load_model(tmp_path / "model")
    assert isinstance(ours, BEVT)
    assert torch.equal(ours.mask_token, state["backbone.mask_token"].flatten())
    assert torch.equal(ours.decoder["video"].lift.weight, state["backbone.fpn_t.0.weight"])
    assert (
        ours.swin.stages[0].blocks[0].released_quirks
    )  # trained with the quirks, loaded with them


def test_an_official_checkpoint_starts_fine_tuning_as_it_is(tmp_path):
    state = official(tmp_path)
    model = Classifier(num_classes=3, window=(4, 3, 3), **SMALL)
    report = start_classifier(model, read_weights(tmp_path / "official.pth"))
    assert torch.equal(model.patch_embed.proj.weight, state["backbone.patch_embed.proj.weight"])
    assert torch.equal(model.norm.bias, state["backbone.norm.bias"])
    assert "fresh" in report.table() and "mask_token" in report.left_out


def test_a_tensor_that_does_not_belong_is_named(tmp_path):
    state = official(tmp_path)
    with pytest.raises(ValueError, match=r"left over 1 .*backbone\.surprise"):
        recognise(state | {"backbone.surprise": torch.zeros(1)})
    del state["backbone.norm.weight"]
    torch.save(state, tmp_path / "lacking.pth")
    with pytest.raises(ValueError, match=r"not a whole model .*missing 1 \(norm\.weight\)"):
        convert(tmp_path / "lacking.pth", tmp_path / "model")


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1


@pytest.mark.parametrize("size", ["t", pytest.param("s", marks=pytest.mark.slow),
                                  pytest.param("b", marks=pytest.mark.slow)])  # fmt: skip
def test_torchvisions_swin3d_gives_the_same_logits_here(size, tmp_path):
    theirs = getattr(torchvision.models.video, f"swin3d_{size}")(weights=None).eval()
    for name, p in theirs.named_parameters():
        if "bias_table" in name:
            p.data.normal_(std=0.5)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "model")
    ours = load_model(tmp_path / "model")
    pixels = torch.randn(1, 3, 6, 64, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(ours.logits(pixels), theirs(pixels), atol=1e-5)
    convert(tmp_path / "model", tmp_path / "back.pth", "torchvision")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(back, strict=True)
    assert all(torch.equal(v, back[k]) for k, v in read_file(tmp_path / "theirs.pth").items())


@pytest.mark.parametrize("window, side", [(7, 224), (12, 384)])
def test_timms_2d_swin_gives_the_same_features_here(window, side, tmp_path):
    """Inflated to still clips of one time step, or as an image stream: the same features."""
    full = timm.create_model(
        "swin_tiny_patch4_window7_224", pretrained=False, num_classes=10, window_size=window,
        img_size=side, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4),
    ).eval()  # fmt: skip
    randomise(full)
    torch.save(full.state_dict(), tmp_path / "timm.pth")
    found = read_checkpoint(tmp_path / "timm.pth")
    assert found.format == "timm"
    shape = architecture(found.state)
    assert shape["window"] == (1, window, window)
    settings = {k: shape[k] for k in ("embed_dim", "depths", "num_heads")}
    image = BEVT(vocab_size=4, streams=("image",), window=(2, window, window), **settings)
    clips = Classifier(num_classes=4, window=(2, window, window), **settings)
    start_pretraining(image, found.state)
    report = start_classifier(clips, found.state)
    assert len(report.inflated) == sum(shape["depths"]) + 4
    picture = torch.randn(1, 3, 1, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = full.forward_features(picture[:, :, 0])
        mine = image.norm(image.swin(image.patch_embed["image"](picture))[-1])[:, 0]
        still = clips.features(picture.expand(-1, -1, 2, -1, -1))[:, 0]
    assert torch.allclose(mine, expected, atol=2e-5)
    assert torch.allclose(still, expected, atol=2e-5)
    back, left = export(image.state_dict(), "timm")
    assert {k for k in left if not k.startswith(("decoder", "token_head"))} == {"mask_token"}
    own = full.state_dict()
    assert back.keys() == {k for k in own if not k.startswith("head")}
    assert all(torch.equal(v, own[k]) for k, v in back.items())


def test_inflation_keeps_what_a_still_clip_gives():
    image = parts.build_bevt(lesson_image())
    joint = parts.build_bevt(lesson_joint())
    fresh = joint.token_head.weight.clone()
    report = start_pretraining(joint, image.state_dict())
    assert torch.equal(joint.token_head.weight, fresh)
    assert {n.split(".")[0] for n in report.fresh} == {"decoder", "token_head"}
    assert all(n.startswith("patch_embed.video") for n in report.inflated)
    still = torch.randn(1, 3, 1, 96, 96)
    one = joint.patch_embed["image"](still)
    two = joint.patch_embed["video"](still.expand(-1, -1, 2, -1, -1))
    assert torch.allclose(one, two, atol=1e-5)


def test_a_classifier_takes_the_encoder_and_leaves_the_rest():
    joint = parts.build_bevt(lesson_joint())
    recipe = FINETUNE["lesson_how"]()
    model = parts.build_classifier(recipe)
    report = start_classifier(model, joint.state_dict())
    assert sorted(report.fresh) == ["head.bias", "head.weight"]
    assert torch.equal(model.patch_embed.proj.weight, joint.patch_embed["video"].proj.weight)
    classifier.init_antisymmetric(model, 1.0)
    kernel = model.patch_embed.proj.weight
    assert torch.equal(kernel[:, :, 1], -kernel[:, :, 0])
    still = torch.randn(1, 3, 1, 96, 96).expand(-1, -1, 8, -1, -1)
    embedded = model.patch_embed.proj(still)
    assert torch.allclose(embedded, model.patch_embed.proj.bias.view(1, -1, 1, 1, 1).expand_as(
        embedded), atol=1e-4)  # fmt: skip


def test_a_video_swin_checkpoint_becomes_a_classifier_and_goes_back(tmp_path):
    model = Classifier(num_classes=5, window=(4, 3, 3), released_quirks=True, **SMALL).eval()
    randomise(model)
    state, _ = export(model.state_dict(), "bevt")
    torch.save({"state_dict": state, "meta": {"CLASSES": ("a", "b")}}, tmp_path / "video_swin.pth")
    convert(tmp_path / "video_swin.pth", tmp_path / "model")
    ours = load_model(tmp_path / "model")
    assert isinstance(ours, Classifier) and ours.classes == tuple("01234")
    pixels = torch.randn(1, 3, 6, 40, 32)
    assert torch.equal(ours.logits(pixels), model.logits(pixels))
    bare = {k.removeprefix("backbone."): v for k, v in state.items() if "cls_head" not in k}
    report = start_classifier(ours, recognise(bare).state)  # an exported backbone, no prefix
    assert sorted(report.fresh) == ["head.bias", "head.weight"] and not report.left_out


def test_a_2d_repository_checkpoint_goes_through_timms_own_converter(tmp_path):
    """Written under the repository's names and read by timm: our image path's features."""
    ours = BEVT(vocab_size=4, streams=("image",), window=(2, 7, 7), **SMALL).eval()
    randomise(ours)
    save_weights(ours.state_dict(), tmp_path / "ours.safetensors")
    table = convert(tmp_path / "ours.safetensors", tmp_path / "swin.pth", "swin")
    written = torch.load(tmp_path / "swin.pth", weights_only=True)["model"]
    assert "swin weights" in table and {"mask_token", "fpn.0.weight", "lm_down.bias"} <= set(
        written
    )
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224", pretrained=False, num_classes=0, embed_dim=16,
        depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4),
    ).eval()  # fmt: skip
    plain = {k: v for k, v in written.items() if k.startswith(("patch_embed", "layers", "norm"))}
    converted = timm.models.swin_transformer.checkpoint_filter_fn({"model": plain}, theirs)
    theirs.load_state_dict(converted, strict=True)
    picture = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine = ours.norm(ours.swin(ours.patch_embed["image"](picture[:, :, None]))[-1])[:, 0]
        assert torch.allclose(mine, theirs.forward_features(picture), atol=2e-5)


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "encoder.", "backbone.", "module.encoder."])
def test_an_image_stream_checkpoint_there_and_back(tmp_path, wrapper, prefix):
    """However it is wrapped, an unreleased image stream's tensors come back bit by bit."""
    config = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window2d": 7,
              "extras": True, "scale": 0.05}  # fmt: skip
    state = {k: v for k, v in swin2d(config).items() if "fc_norm" not in k}
    state["layers.2.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49).long()
    torch.save({wrapper: {prefix + k: v for k, v in state.items()}, "epoch": 800},
               tmp_path / "image.pth")  # fmt: skip
    table = convert(tmp_path / "image.pth", tmp_path / "ours.safetensors")
    assert table.count("rebuilt from the window") == 1
    convert(tmp_path / "ours.safetensors", tmp_path / "back.pth", "swin")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    mine = {k for k in back if not k.endswith("index")}
    assert mine == {k for k in state if not k.endswith(("index", "attn_mask"))}
    assert all(torch.equal(back[k], state[k]) for k in mine)


class Hostile:
    """Unpickled with trust it would run a command."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_no_code_from_a_pickle_is_run(tmp_path):
    mark = tmp_path / "owned"
    evil = {"state_dict": {"a": torch.zeros(1)}, "meta": Hostile(mark)}
    torch.save(evil, tmp_path / "zip.pth")
    torch.save(evil, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for protocol in (2, 4):
        (tmp_path / f"bare{protocol}.pkl").write_bytes(pickle.dumps(evil["meta"], protocol))
    for path in sorted(tmp_path.glob("*.p*")):
        with pytest.raises(ValueError, match=r"is refused: its pickle .*") as caught:
            read_file(path)
        assert "\n" not in str(caught.value) and path.name in str(caught.value)
        assert path.stem.startswith("bare") or "system" in str(caught.value)
    assert not mark.exists()
    pickle.loads((tmp_path / "bare2.pkl").read_bytes())  # it is hostile: trusted, it runs
    assert mark.exists()


def test_files_that_are_no_weights_end_in_one_line(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>Quota exceeded</html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 1, "lr": 0.1}, tmp_path / "no_tensors.pth")
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "resnet.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    messages = {"cut": "damaged", "page": "web page", "empty": "not a readable",
                "list": "not a state", "no_tensors": "no weights inside",
                "resnet": "not Swin weights",
                "module": "torch.nn.modules.linear.Linear", "missing": "no weights at"}  # fmt: skip
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message) as caught:
            read_checkpoint(tmp_path / f"{name}.pth")
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_windows_are_told_from_tables():
    for window in [(8, 7, 7), (16, 7, 7), (4, 3, 3), (8, 5, 5), (5, 7, 7), (4, 8, 8)]:
        rows = math.prod(2 * w - 1 for w in window)
        assert window_of(rows) == window
        assert window_of(rows, near=(2, *window[1:])) == window
        assert window_of(rows, tokens=math.prod(window)) == window
    assert window_of(23 * 23, near=(8, 7, 7), flat=True) == (1, 12, 12)
    assert window_of(15 * 15, near=(8, 7, 7), flat=True) == (1, 8, 8)
    assert window_of(3 * 5 * 7, near=(2, 3, 4)) == (2, 3, 4)
    with pytest.raises(ValueError, match="fits no window"):
        window_of(7)


def test_a_model_folder_gives_the_same_model_back(tmp_path):
    views = ClipSpec(frames=8, interval=2, size=64, short=(70, 80), clips=2)
    model = Classifier(num_classes=3, window=(4, 3, 3), classes=["a", "b", "c"], views=views,
                       released_quirks=True, **SMALL)  # fmt: skip
    randomise(model)
    model.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert isinstance(again, Classifier) and again.classes == ("a", "b", "c")
    assert again.views.short == [70, 80] and again.views.clips == 2
    pixels = torch.randn(1, 3, 8, 64, 64)
    with torch.no_grad():
        assert torch.equal(again.logits(pixels), model.eval().logits(pixels))
        assert torch.equal(
            Classifier.from_pretrained(tmp_path / "model").logits(pixels), model.logits(pixels)
        )
    before = tmp_path / "model" / "config.json"  # as folders of the first version have it
    config = json.loads(before.read_text())
    config["released"] = config.pop("released_quirks")
    before.write_text(json.dumps(config))
    with torch.no_grad():
        assert torch.equal(load_model(before.parent).logits(pixels), model.logits(pixels))
    bevt = BEVT(vocab_size=5, window=(4, 3, 3), streams=("image",), **SMALL)
    bevt.save_pretrained(tmp_path / "bevt")
    assert load_model(tmp_path / "bevt").state_dict().keys() == bevt.state_dict().keys()
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        load_model(tmp_path)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"surprise": 1}))
    with pytest.raises(ValueError, match="doesn't describe a model"):
        load_model(tmp_path / "model")
