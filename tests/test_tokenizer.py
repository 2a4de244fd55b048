"""The tokenizer against DALL-E's own code, and the relaxation that trains it."""

import attr
import dall_e
import numpy as np
import pytest
import torch

from bevt_lib import dvae
from bevt_lib.tokenizer import (
    DalleTokenizer,
    build,
    expected_pixels,
    load_tokenizer,
    save_tokenizer,
)
from bevt_lib.weights import save_weights


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
    part = {"pixels": pictures.permute(0, 3, 1, 2).float() / 255, "temperature": 0.5,
            "noise_scale": 1.0, "decoder_only": False, "kl_weight": 0.1,
            "balance_weight": 0.1} | settings  # fmt: skip
    return {"picture": part}


def test_gradients_pass_the_relaxation_and_stop_at_chosen_words(pictures):
    torch.manual_seed(0)
    model = dvae.DVAE(16, 1, 32, (6, 5))
    noise = {"picture": torch.rand(5, model.noise_sizes["picture"])}
    model(batch_of(pictures), noise)["picture"].loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    model.zero_grad()
    model(batch_of(pictures, decoder_only=True, kl_weight=0.0), noise)["picture"].loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.encoder.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.decoder.parameters())


def test_each_picture_has_its_own_noise(pictures):
    model = dvae.DVAE(16, 1, 32, (6, 5))
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
    assert abs(dvae.psnr(pictures, off) - 10 * np.log10(255**2 / 4)) < 1e-6
    assert torch.equal(dvae.mean_colours(pictures), pictures)  # its cells are flat
    codes = dvae.cells_of(pictures).unique(dim=0)
    assert torch.equal(dvae.nearest_code(pictures, codes), pictures)
    assert dvae.usage(torch.tensor([0, 0, 1, 1]), 4) == (0.5, pytest.approx(2.0))


def test_a_tokenizer_survives_saving(parts, pictures, tmp_path):
    save_tokenizer(*parts, tmp_path / "t.safetensors")
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
