"""The model against numbers from the released code: features, stages, losses, gradients, logits."""

import numpy as np
import pytest
import torch
from golden_numbers import CASES, TOLERANCES, arrays, rule_input, rule_weight
from torch import nn

from bevt_lib.base.config import Optim
from bevt_lib.model.bevt import BEVT
from bevt_lib.model.classifier import Classifier
from bevt_lib.model.masking import mask_in_time
from bevt_lib.training.step import stream_weights
from bevt_lib.weights.formats import released_name, released_shape

ATOL = TOLERANCES["outputs_atol"]


def fill(model: nn.Module, scale: float) -> nn.Module:
    """Give every parameter the value that the weight rule gives its released name."""
    state = {}
    for name, value in model.state_dict().items():
        shape = released_shape(name, tuple(value.shape))
        state[name] = torch.from_numpy(rule_weight(released_name(name), shape, scale))
        state[name] = state[name].reshape(value.shape)
    model.load_state_dict(state)
    return model.eval()


def architecture(config: dict) -> dict:
    return {
        "embed_dim": config["embed_dim"],
        "depths": tuple(config["depths"]),
        "num_heads": tuple(config["num_heads"]),
        "window": tuple(config["window"]),
        "patch": tuple(config["patch_size"]),
        "patch_norm": config["patch_norm"],
        "released_quirks": True,
    }


def stats(x: torch.Tensor) -> np.ndarray:
    flat = x.detach().double().flatten()
    values = [flat.mean(), flat.std(correction=0), flat.norm(), flat[0], flat[-1]]
    return np.array([float(v) for v in values])


def watch(model: nn.Module) -> dict[str, torch.Tensor]:
    """Record every intermediate that the golden files hold, under their names, as stats."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name):
        return lambda module, inputs, output: seen.__setitem__(name, stats(output))

    for k, stage in enumerate(model.swin.stages, 1):
        for j, block in enumerate(stage.blocks):
            block.register_forward_hook(keep(f"stage{k}_block{j}"))
    model.norm.register_forward_hook(keep("norm"))
    return seen


def explain(golden, case: str, seen: dict[str, np.ndarray]) -> str:
    """Say at which stage the deviation begins: the per-stage diagnostics of a failure."""
    rows = []
    for name, mine in seen.items():
        key = f"{case}/inter/{name}/stats"
        if key in golden:
            rows.append(f"{name}: mean/std/norm off by {np.abs(mine - golden[key])[:3].max():.2e}")
    return "\n".join(rows)


def deviation(out: torch.Tensor, golden, case: str) -> float:
    s0, s1 = golden[f"{case}/stride"]
    assert list(out.shape) == list(golden[f"{case}/out_shape"])
    return float(np.abs(out[:, ::s0, ::s1].detach().numpy() - golden[f"{case}/out"]).max())


def relative(mine, expected) -> float:
    return abs(float(mine) - float(expected)) / abs(float(expected))


BACKBONES = [(c, k) for c in CASES.get("pretraining_backbone", []) for k in c["cases"]]


@pytest.mark.parametrize("config, case", BACKBONES, ids=lambda c: c["name"])
def test_pretraining_backbone(config, case, parity):
    golden = arrays(config["file"])
    name = case["name"]
    model = fill(BEVT(vocab_size=4, **architecture(config)), config["weight_scale"])
    seen = watch(model)
    pixels = rule_input(case["seed"], case["input_shape"])
    assert np.allclose(golden[f"{name}/input_head"], pixels.flatten()[:4])
    mask = torch.from_numpy(golden[f"{name}/mask"]).bool() if case["mask_shape"] else None
    if case["kind"] == "image":
        pixels = pixels[:, :, None]
        mask = None if mask is None else mask[:, None]
    with torch.no_grad():
        out = model.features(case["kind"], pixels, mask).flatten(1, 3)
    worst = deviation(out, golden, name)
    parity(f"a backbone, {case['kind']}", worst, ATOL, explain(golden, name, seen))
    checked = [k for k in seen if f"{name}/inter/{k}/stats" in golden]
    assert len(checked) >= sum(config["depths"]), "the diagnostics must cover every block"
    for key in checked:
        expected = golden[f"{name}/inter/{key}/stats"]
        assert np.allclose(seen[key], expected, rtol=1e-4, atol=1e-3), explain(golden, name, seen)


class StandInTokenizer(nn.Module):
    """The MANIFEST's stand-in: one 8x8 convolution, token = argmax over channels."""

    def __init__(self, vocab: int, scale: float):
        super().__init__()
        self.conv = nn.Conv2d(3, vocab, kernel_size=8, stride=8)
        for part, value in self.conv.named_parameters():
            rule = rule_weight(f"cls_head.vae_encoder.conv.{part}", value.shape, scale)
            value.data = torch.from_numpy(rule)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).argmax(1)


@pytest.mark.parametrize("case", CASES.get("loss_and_gradients", []), ids=lambda c: c["file"])
def test_loss_and_gradients(case, parity):
    golden = arrays(case["file"])
    config = next(c for c in CASES["pretraining_backbone"] if c["name"] == case["backbone"])
    model = fill(BEVT(vocab_size=case["vocab"], **architecture(config)), case["weight_scale"])
    tokenizer = StandInTokenizer(case["vocab"], case["weight_scale"])
    seed = case["seed"]
    video_ids = tokenizer(rule_input(seed + 1, case["video_frames_shape"]))
    image_ids = tokenizer(rule_input(seed + 3, case["image_frames_shape"]))
    assert np.array_equal(image_ids, golden["token_ids_image"])
    assert np.array_equal(video_ids[:2], golden["token_ids_video_first_frames"])
    clips = case["video_shape"][0]
    batch = {
        "video": {
            "pixels": rule_input(seed, case["video_shape"]),
            "ids": video_ids.unflatten(0, (clips, -1)),
            "mask": torch.from_numpy(golden["mask_video_in"]).bool(),
        },
        "image": {
            "pixels": rule_input(seed + 2, case["image_shape"])[:, :, None],
            "ids": image_ids[:, None],
            "mask": torch.from_numpy(golden["mask_image"]).bool()[:, None],
        },
    }
    terms = model(batch)
    video, image = terms["video"], terms["image"]
    rtol = TOLERANCES["loss_rtol"]
    means = video.loss / video.count, image.loss / image.count
    loss = means[0] + means[1]
    for mine, key in ((means[0], "loss_cls_3d"), (means[1], "loss_cls_2d"), (loss, "loss")):
        parity("b losses (relative)", relative(mine, golden[key]), rtol)
    for term, key in ((video, "mask_acc_3d"), (image, "mask_acc_2d")):
        assert np.isclose(int(term.logs["accuracy"]) / term.count, float(golden[key]), atol=1e-6)
    loss.backward()
    norms = {released_name(n): p.grad.double().norm().item() for n, p in model.named_parameters()}
    rtol = TOLERANCES["grad_norm_rtol"]
    assert set(norms) == set(golden["grad_names"])
    for name, expected in zip(golden["grad_names"], golden["grad_norms"], strict=True):
        if expected > 1e-7:  # a key's bias has no gradient but rounding
            parity("d gradient norms (relative)", relative(norms[name], expected), rtol, name)
        else:
            assert norms[name] < 1e-6, name
    total = np.sqrt(sum(n**2 for n in norms.values()))
    parity("d gradient norms (relative)", relative(total, golden["total_grad_norm"]), rtol)


@pytest.mark.parametrize("case", CASES.get("head", []), ids=lambda c: c["file"])
def test_head(case, parity):
    """The token head alone, on given features, through the model's own loss."""
    golden = arrays(case["file"])
    width, (h, w), clip_len = case["in_channels"], case["grid"], case["clip_len"]
    model = BEVT(vocab_size=case["vocab"], embed_dim=width // 8, depths=(1, 1, 1, 1),
                 num_heads=(1, 1, 1, 1), window=(2, 2, 2), patch=(1, 4, 4))  # fmt: skip
    for part, value in model.token_head.named_parameters():
        rule = rule_weight(f"cls_head.lm_head.{part}", value.shape, case["weight_scale"])
        value.data = torch.from_numpy(rule)
    seed = case["seed"]
    tokenizer = StandInTokenizer(case["vocab"], case["weight_scale"])
    ids = torch.cat([tokenizer(rule_input(seed + 2, case["frames_shape"])),
                     tokenizer(rule_input(seed + 3, case["images_shape"]))])  # fmt: skip
    assert np.array_equal(ids, golden["token_ids"])
    frames, images = case["frames_shape"][0], case["images_shape"][0]
    features = {
        "video": rule_input(seed, (frames // clip_len, clip_len * h * w, width)),
        "image": rule_input(seed + 1, (images, h * w, width)),
    }
    targets = {
        "video": (ids[:frames].unflatten(0, (-1, clip_len)), golden["mask_3d"], "3d"),
        "image": (ids[frames:, None], golden["mask_2d"][:, None], "2d"),
    }
    both = (case.get("loss_weight_3d", 1.0), case.get("loss_weight_2d", 1.0))
    weights = stream_weights(Optim(lr=1.0, clips=1, steps=1, loss_weights=both))
    for stream, (tokens, mask, tag) in targets.items():
        given = features[stream].view(*tokens.shape, width)
        model.features = lambda *args, given=given: given
        term = model.stream_loss(stream, None, tokens, torch.from_numpy(mask).bool())
        weighted = weights[stream] * float(term.loss) / term.count
        rtol = TOLERANCES["loss_rtol"]
        parity("b losses (relative)", relative(weighted, golden[f"loss_cls_{tag}"]), rtol)
        head = model.token_head(features[stream])[0, :3, :8].detach()
        key = next(k for k in golden if k.startswith("logits") and tag in k)
        parity("b token head", np.abs(head.numpy() - golden[key]).max(), ATOL)


CLASSIFIERS = [(c, k) for c in CASES.get("classifier", []) for k in c["cases"]]


@pytest.mark.parametrize("config, case", CLASSIFIERS, ids=lambda c: c["name"])
def test_classifier(config, case, parity):
    golden = arrays(config["file"])
    name, classes = case["name"], config["num_classes"]
    model = fill(Classifier(num_classes=classes, **architecture(config)), config["weight_scale"])
    seen = watch(model)
    pixels = rule_input(case["seed"], case["input_shape"])
    if case["kind"] == "views":
        with torch.no_grad():
            logits = model.logits(pixels[0])
        average = logits.softmax(-1).mean(0, keepdim=True)
        for mine, key in ((logits, "logits_per_view"), (average, "prob_average")):
            parity("c views", np.abs(mine.numpy() - golden[f"{name}/{key}"]).max(), ATOL)
        return
    with torch.no_grad():
        features = model.features(pixels).permute(0, 4, 1, 2, 3)
        logits = model.logits(pixels)
    worst = np.abs(features[:, ::5].numpy() - golden[f"{name}/feat"]).max()
    parity("c classifier features", worst, ATOL, explain(golden, name, seen))
    parity("c classifier logits", np.abs(logits.numpy() - golden[f"{name}/logits"]).max(), ATOL)
    labels = torch.from_numpy(golden[f"{name}/labels"]).long()
    for smoothing, key in ((0.0, "loss_hard"), (0.1, "loss_smooth0.1")):
        model.smoothing = smoothing
        term = model({"clip": {"pixels": pixels, "label": labels}})["clip"]
        mean = float(term.loss) / term.count
        rtol = TOLERANCES["loss_rtol"]
        parity("c classifier losses (relative)", relative(mean, golden[f"{name}/{key}"]), rtol)


def test_the_lift_in_time_doubles_each_step():
    mask = torch.tensor([[True, False, True]])[..., None, None]
    assert mask_in_time(mask, 2).flatten().tolist() == [True, True, False, False, True, True]
