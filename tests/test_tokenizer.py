"""The tokenizer against DALL-E's own code, and the relaxation that trains it."""

import json
import os
import subprocess
import sys
from random import Random

import attr
import dall_e
import numpy as np
import pytest
import torch

from bevt_lib import pretrain
from bevt_lib.base import files
from bevt_lib.cli import parse
from bevt_lib.datasets import sources
from bevt_lib.model.bevt import BEVT
from bevt_lib.model.masking import block_mask, tube_mask
from bevt_lib.presets import lesson_image
from bevt_lib.tokenizers import base, baselines, dvae
from bevt_lib.tokenizers.base import CPU_PIXELS, add_tokens
from bevt_lib.tokenizers.dalle import DalleTokenizer, build, expected_pixels
from bevt_lib.tokenizers.load import load_tokenizer
from bevt_lib.tokenizers.peco import PecoShape, PecoTokenizer
from bevt_lib.weights.load import save_weights


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    return build(hidden=16, blocks=1, vocab_size=32)


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (5, 6, 5, 3), dtype=np.uint8)
    return torch.from_numpy(small.repeat(8, 1).repeat(8, 2))


def test_ids_are_the_packages_own_argmax(parts, pictures):
    tokenizer = DalleTokenizer(*parts)
    x = pictures.permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        expected = parts[0](dall_e.map_pixels(x)).argmax(1)
    ids = tokenizer.encode(pictures)
    assert ids.shape == (5, 6, 5) and ids.dtype == torch.int64 and torch.equal(ids, expected)
    assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size == 32


def test_channels_last_changes_no_id(parts, pictures):
    plain = DalleTokenizer(*parts).encode(pictures)
    tokenizer = DalleTokenizer(*parts)
    tokenizer.encoder.to(memory_format=torch.contiguous_format)
    assert torch.equal(tokenizer.encode(pictures), plain)


def test_half_precision_is_the_packages_own(parts, pictures, monkeypatch):
    """Its convolutions but the last run in float16 on CUDA: here as well, without that condition.

    Outside of autocast all is float32, also where a flag of the package says otherwise.
    """
    tokenizer = DalleTokenizer(*parts)
    exact = tokenizer.logits(pictures)
    with torch.autocast("cpu", torch.float16):
        half, ids = tokenizer.logits(pictures), tokenizer.encode(pictures)

    def anywhere(conv, x):
        dtype = torch.float16 if conv.use_float16 else torch.float32
        w, b = conv.w.to(dtype), conv.b.to(dtype)
        return torch.nn.functional.conv2d(x.to(dtype), w, b, padding=conv.kw // 2)

    convs = [m for m in parts[0].modules() if isinstance(m, dall_e.utils.Conv2d)]
    assert not any(conv.use_float16 for conv in convs)  # CUDA's float32 is ours to choose
    for conv in convs:
        conv.use_float16 = conv is not parts[0].blocks.output.conv
    monkeypatch.setattr(dall_e.utils.Conv2d, "forward", anywhere)
    x = pictures.permute(0, 3, 1, 2).float() / 255
    own = parts[0](dall_e.map_pixels(x.contiguous(memory_format=torch.channels_last)))
    assert half.dtype == torch.float32 and torch.equal(half, own)
    assert torch.equal(ids, own.argmax(1))
    assert 1e-6 < (half - exact).abs().max() < 0.05


def test_half_precision_changes_few_of_the_trained_ids():
    """21 of 18,432 on 512 held-out stills in float16, 236 in bfloat16 (two CPU cores)."""
    tokenizer = load_tokenizer(files.data_folder() / "weights" / "lesson_dvae.safetensors")
    items = sources.pretraining_items(lesson_image(), "image", "test")
    pictures = torch.from_numpy(
        np.stack([items.sample(0, i)["tokenizer_input"][0] for i in range(48)])
    )
    exact = tokenizer.encode(pictures)
    with torch.autocast("cpu", torch.float16):
        changed = (tokenizer.encode(pictures) != exact).float().mean()
    assert changed < 0.01 and len(exact.unique()) > 64


def test_the_full_architecture_has_dalles_parameters():
    with torch.device("meta"):
        encoder, decoder = build(hidden=256, blocks=2, vocab_size=8192)
        own = dall_e.Encoder(requires_grad=False)
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    assert {k: v.shape for k, v in encoder.state_dict().items()} == {
        k: v.shape for k, v in own.state_dict().items()
    }
    assert {k: v.shape for k, v in decoder.state_dict().items()} == {
        k: v.shape for k, v in dall_e.Decoder().state_dict().items()
    }
    assert not attr.validators.get_disabled()


def test_decoding_paints_uint8_of_the_right_size(parts):
    painted = DalleTokenizer(*parts).decode(torch.randint(0, 32, (3, 4, 5)))
    assert painted.shape == (3, 32, 40, 3) and painted.dtype == torch.uint8


def test_expected_pixels_agree_with_sampling():
    mean, log_spread = torch.tensor([0.7, -1.0]), torch.tensor([-0.5, 0.3])
    noise = torch.distributions.Laplace(0.0, 1.0).sample((200_000,))
    sampled = torch.sigmoid(mean + log_spread.exp() * noise[:, None]).mean(0)
    assert torch.allclose(expected_pixels(mean, log_spread, points=101), sampled, atol=5e-3)


def test_the_density_of_a_pixel_integrates_to_one():
    x = torch.linspace(1e-4, 1 - 1e-4, 20_001)
    for mean, log_spread in ((0.0, 0.0), (1.0, -1.0), (-2.0, 0.4)):
        nll = dvae.logit_laplace_nll(x, torch.tensor(mean), torch.tensor(log_spread))
        assert abs(torch.trapezoid((-nll).exp(), x).item() - 1) < 0.02


def test_divergence_from_uniform_agrees_with_torch():
    logits = torch.randn(2, 7, 3, 3)
    uniform = torch.full((7,), 1 / 7)
    rows = logits.permute(0, 2, 3, 1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=rows), torch.distributions.Categorical(uniform)
    )
    assert torch.allclose(dvae.kl_to_uniform(logits), expected, atol=1e-5)


def batch_of(pictures, **settings):
    schedule = {"temperature": 0.5, "noise_scale": 1.0, "decoder_only": False, "kl_weight": 0.1,
                "balance_weight": 0.1} | settings  # fmt: skip
    pixels = pictures.permute(0, 3, 1, 2).float() / 255
    return {"picture": {"pixels": pixels, "schedule": schedule}}


SCHEDULE = {
    "temperature": (1.0, 0.25, 8),
    "kl_weight": (0.0, 4.0, 4),
    "balance_weight": (0.3, 0.3, 0),
}


def test_gradients_pass_the_relaxation_and_stop_at_chosen_ids(pictures):
    torch.manual_seed(0)
    model = dvae.DVAE(*build(16, 1, 32), (6, 5), SCHEDULE)
    noise = {"picture": torch.rand(5, model.noise_sizes["picture"])}
    model(batch_of(pictures), noise)["picture"].loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    model.zero_grad()
    model(batch_of(pictures, decoder_only=True, kl_weight=0.0), noise)["picture"].loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.encoder.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.decoder.parameters())


# A few steps of each kind of the lesson tokenizer: with noise, without, and of the decoder alone.
ALL_KINDS = """
import sys
from dataclasses import replace
from bevt_lib import train_tokenizer
from bevt_lib.base import distributed
from bevt_lib.presets import lesson_dvae
recipe = lesson_dvae()
optim = replace(recipe.optim, images=8, steps=4, warmup=0, restarts=((3, 0.5), (4, 0.5)))
run = replace(recipe.run, threads=1, folder=sys.argv[1])
recipe = replace(recipe, hidden=16, optim=optim, run=run, balance_weight=0.0, watch_every=0)
with distributed.world():
    train_tokenizer.train(recipe)
"""


@pytest.mark.slow
def test_processes_train_alike_where_the_encoder_is_left_out(tmp_path):
    (tmp_path / "run.py").write_text(ALL_KINDS)
    spread = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    curves = []
    for processes in ("1", "2"):
        folder = tmp_path / processes
        told = subprocess.run(
            [*spread, processes, str(tmp_path / "run.py"), str(folder)], capture_output=True,
            text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert told.returncode == 0, told.stderr[-2000:]
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    one, two = np.array(curves)
    assert len(one) == 11 and np.allclose(one[:6], two[:6], rtol=1e-3)
    assert np.allclose(one, two, rtol=1e-2)  # an id at the border may turn by rounding
    assert one[-1] < one[-4]


def test_a_schedule_sets_what_a_step_minimises():
    """Half cosines between start and end; without noise in the second cosine of the rate."""
    model = dvae.DVAE(*build(16, 1, 32), (6, 5), SCHEDULE)
    plain = {"noise_scale": 1.0, "decoder_only": False, "balance_weight": 0.3}
    assert model.schedule_at(0, 0) == plain | {"temperature": 1.0, "kl_weight": 0.0}
    assert model.schedule_at(4, 1) == plain | {
        "temperature": 0.625,
        "kl_weight": 4.0,
        "noise_scale": 0.0,
    }
    last = plain | {"temperature": 0.25, "kl_weight": 4.0, "noise_scale": 0.0, "decoder_only": True}
    assert model.schedule_at(100, 2) == last


def test_each_picture_has_its_own_noise(pictures):
    model = dvae.DVAE(*build(16, 1, 32), (6, 5), SCHEDULE)
    noise = torch.rand(5, model.noise_sizes["picture"])
    settings = {"balance_weight": 0.0}
    whole = model(batch_of(pictures, **settings), {"picture": noise})["picture"].loss
    halves = [
        model(batch_of(pictures[part], **settings), {"picture": noise[part]})["picture"].loss
        for part in (slice(0, 2), slice(2, 5))
    ]
    assert torch.allclose(whole, sum(halves), rtol=1e-5)


def test_kmeans_finds_separated_clusters():
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = truth.repeat(50, 1) + 0.1 * torch.randn(150, 2, generator=generator)
    centres = min(
        (dvae.kmeans(points, 3, torch.Generator().manual_seed(s)) for s in range(5)),
        key=lambda c: torch.cdist(points, c).min(1).values.sum(),
    )
    assert torch.cdist(truth, centres).min(1).values.max() < 0.2


def test_psnr_and_baselines(pictures):
    off = (pictures.int() + torch.where(pictures < 128, 2, -2)).to(torch.uint8)
    assert abs(base.psnr(pictures, off) - 10 * np.log10(255**2 / 4)) < 1e-6
    assert torch.equal(baselines.mean_colours(pictures), pictures)  # its cells are flat
    codes = baselines.cells_of(pictures).unique(dim=0)
    assert torch.equal(baselines.nearest_code(pictures, codes), pictures)
    assert base.usage(torch.tensor([0, 0, 1, 1]), 4) == (0.5, pytest.approx(2.0))


def peco(factor=16):
    torch.manual_seed(2)
    tokenizer = PecoTokenizer(PecoShape(8, 1, 4, factor, 24))
    colours = 2 * torch.rand(24, 3, 1, 1).expand(-1, -1, 2 * factor, 2 * factor) - 1
    tokenizer.codes.copy_(tokenizer.encoder(colours)[:, :, 0, 0])
    return tokenizer


def cells(rng, *shape):
    """Pictures of one colour in each cell of 8 x 8 pixels: uint8."""
    small = rng.integers(0, 256, (*shape[:-2], shape[-2] // 8, shape[-1] // 8, 3), dtype=np.uint8)
    return small.repeat(8, -3).repeat(8, -2)


@pytest.mark.parametrize("kind", ["dalle", "peco"])
def test_all_tokenizers_have_one_interface(parts, kind, tmp_path):
    """Pixels 0 to 255 in and out; vocabulary and factor are the file's."""
    path = tmp_path / "tokenizer.safetensors"
    made = peco() if kind == "peco" else DalleTokenizer(*parts)
    made.save(path)
    tokenizer = load_tokenizer(path)
    assert type(tokenizer) is type(made)
    assert (tokenizer.vocab_size, tokenizer.factor) == (made.vocab_size, made.factor)
    assert tokenizer.digest() == made.digest()
    pictures = torch.from_numpy(
        cells(np.random.default_rng(0), CPU_PIXELS // (32 * 48) + 3, 32, 48)
    )
    ids = tokenizer.encode(pictures)
    assert torch.equal(ids, made.encode(pictures)) and ids.dtype == torch.int64
    assert ids.shape == (len(pictures), 32 // made.factor, 48 // made.factor)
    assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size and len(ids.unique()) > 3
    painted = tokenizer.decode(ids)
    assert painted.shape == pictures.shape and painted.dtype == torch.uint8
    assert painted.max() > 2  # not in 0..1
    alone = torch.cat([tokenizer.encode(picture[None]) for picture in pictures[-4:]])
    assert torch.equal(ids[-4:], alone)
    for wrong in (pictures.float(), pictures[0], pictures.permute(0, 3, 1, 2), pictures[:, :28]):
        with pytest.raises(ValueError, match=r"uint8|multiples"):
            tokenizer.encode(wrong)


@pytest.mark.parametrize("kind", ["dalle", "peco"])
def test_the_digest_is_of_what_ids_depend_on(kind):
    """A changed encoder or codebook changes it, a changed decoder doesn't."""
    made = peco() if kind == "peco" else DalleTokenizer(*build(16, 1, 32))
    first = made.digest()
    for part, differs in (("decoder.", False), ("encoder.", True), ("codes", True)):
        for name, value in made.state_dict().items():
            if name.startswith(part):
                value.add_(1.0)
                assert (made.digest() != first) == differs, name
                value.sub_(1.0)
                first = made.digest()  # rounding may have changed the value


def test_a_run_and_its_plan_are_sized_from_the_file(tmp_path):
    """PeCo at 16 px a token: an input of 96 px, where the recipe's own tokenizer wants 48."""
    peco().save(tmp_path / "peco.safetensors")
    recipe = parse(lesson_image(), [
        "--tokens.weights", str(tmp_path / "peco.safetensors"), "--data.workers", "0",
        "--optim.images", "2", "--run.stop-after", "1", "--run.folder", str(tmp_path / "run"),
    ])  # fmt: skip
    assert "peco.safetensors: 24 tokens of 16 px" in " ".join(pretrain.plan(recipe).split())
    model, history = pretrain.train(recipe)
    assert model.token_head.out_features == 24 and len(history) == 1
    assert pretrain.score(recipe, model, "image", 4).places > 0
    assert recipe.tokens.vocab_size == 256  # a recipe is a value


class Counting:
    """A tokenizer that counts the pictures it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.seen = tokenizer, 0

    def encode(self, pictures):
        self.seen += len(pictures)
        return self.tokenizer.encode(pictures)


@pytest.mark.parametrize("make", [lambda parts: DalleTokenizer(*parts), lambda parts: peco(8)])
def test_encoding_only_frames_with_a_hidden_place_changes_no_bit(parts, make):
    """Losses, counts and gradients of a joint batch, bit by bit; a quarter less is encoded."""
    rng, clips, frames = np.random.default_rng(0), 4, 8
    masks = np.stack([tube_mask((frames // 2, 4, 4), Random(i)) for i in range(clips)])
    stills = np.stack([block_mask((4, 4), Random(i))[None] for i in range(3)])

    def part(mask, frames):
        size = len(mask), frames
        fields = {"pixels": cells(rng, *size, 64, 64), "tokenizer_input": cells(rng, *size, 32, 32),
                  "mask": mask}  # fmt: skip
        return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in fields.items()}

    batch = {"video": part(masks, frames), "image": part(stills, 1)}
    torch.manual_seed(1)
    model = BEVT(vocab_size=32, embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2),
                 window=(4, 2, 2), linear_std=0.0)  # fmt: skip
    told = []
    for hidden_only in (False, True):
        tokenizer = Counting(make(parts))
        ready = add_tokens(batch, tokenizer, hidden_only=hidden_only)
        model.zero_grad()
        terms = model(ready)
        sum(term.loss for term in terms.values()).backward()
        told.append((tokenizer.seen, ready, terms, [p.grad.clone() for p in model.parameters()]))
    (every, whole, terms, grads), (some, ready, sparse, sparse_grads) = told
    kept = masks.any((2, 3)).repeat(2, 1)
    assert every == clips * frames + 3 and some == kept.sum() + 3 < every
    for stream in batch:
        assert torch.equal(sparse[stream].loss, terms[stream].loss)
        assert sparse[stream].count == terms[stream].count > 0
        assert torch.equal(sparse[stream].logs["accuracy"], terms[stream].logs["accuracy"])
    assert all(torch.equal(a, b) for a, b in zip(grads, sparse_grads, strict=True))
    ids = ready["video"]["ids"]
    assert torch.equal((ids >= 0).all((2, 3)), torch.from_numpy(kept))
    assert torch.equal(ids[kept], whole["video"]["ids"][kept]) and (ids[~kept] == -1).all()
    assert len(ids[kept].unique()) > 3 and whole["video"]["ids"].min() >= 0
    assert torch.equal(ready["image"]["ids"], whole["image"]["ids"])


def test_a_tokenizer_survives_saving(parts, pictures, tmp_path):
    DalleTokenizer(*parts).save(tmp_path / "t.safetensors")
    again = load_tokenizer(tmp_path / "t.safetensors")
    assert torch.equal(again.encode(pictures), DalleTokenizer(*parts).encode(pictures))
    again.train()
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_wrong_files_and_pictures_are_refused(parts, pictures, tmp_path):
    (tmp_path / "page.html").write_text("<html>")
    save_weights({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    for name, message in (("none", "no tokenizer at"), ("page.html", "not a readable"),
                          ("other.safetensors", "holds no tokenizer")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name)
    tokenizer = DalleTokenizer(*parts)
    with pytest.raises(ValueError, match="multiples of 8"):
        tokenizer.encode(pictures[:, :44])
    with pytest.raises(ValueError, match="uint8"):
        tokenizer.encode(pictures.float())


def test_ids_do_not_depend_on_how_many_cores_name_pictures():
    tokenizer = DalleTokenizer(*build(128, 1, 64))
    pictures = torch.randint(0, 256, (30, 64, 64, 3), dtype=torch.uint8)
    before, ids = torch.get_num_threads(), []
    try:
        for cores in (1, 3):
            torch.set_num_threads(cores)
            ids.append(tokenizer.encode(pictures))
            assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*ids) and not ids[1].is_inference()
