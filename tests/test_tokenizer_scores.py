"""The scores of tokenizers against slow formulas, and on ids whose meaning is known."""

import json

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from bevt_lib import tokenizer_scores
from bevt_lib.tokenizer_scores import Readability, read_what, ssim
from bevt_lib.tokenizers.perceptual import LABEL_FREE, PerceptualDistance


def test_ssim_is_that_of_wang_et_al():
    """Against their formula at every place where the 11 x 11 window fits, one window at a time."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 24, 32, 3), dtype=np.uint8)
    painted = np.clip(pictures + rng.normal(0, 40, pictures.shape), 0, 255).astype(np.uint8)
    row = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(row, row) / row.sum() ** 2
    found = []
    for x, y in zip(*(sliding_window_view(p.astype(float), (11, 11), (1, 2)).reshape(-1, 11, 11)
                      for p in (pictures, painted)), strict=True):  # fmt: skip
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        cov = (weights * (x - mx) * (y - my)).sum()
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        alike = (2 * mx * my + c1) * (2 * cov + c2)
        found.append(alike / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    mine = ssim(torch.from_numpy(pictures), torch.from_numpy(painted))
    assert len(found) == 3 * 14 * 22 * 3 and mine == pytest.approx(np.mean(found), abs=1e-9)
    assert ssim(torch.from_numpy(pictures), torch.from_numpy(pictures)) == pytest.approx(1.0)


def stills(kind, count, seed):
    """Ids (count, 2, 2) out of 8, and 4 labels that they tell, in one of two ways, or not."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    ids = rng.integers(0, 4, (count, 2, 2))
    if kind == "which":  # id 4 + label somewhere
        ids.reshape(count, 4)[np.arange(count), rng.integers(0, 4, count)] = 4 + labels
    if kind == "where":  # id 7 at the place of the label's number
        ids.reshape(count, 4)[np.arange(count), labels] = 7
    return torch.from_numpy(ids), labels


@pytest.mark.parametrize(
    "kind, bag, placed", [("which", 1.0, 1.0), ("where", 0.25, 1.0), ("neither", 0.25, 0.25)]
)
def test_a_linear_reader_reads_what_is_there(kind, bag, placed):
    train, test = stills(kind, 600, 0), stills(kind, 400, 1)
    for where, expected in ((False, bag), (True, placed)):
        told = read_what(train, test, 8, where=where)
        assert told.error == pytest.approx(np.sqrt(told.accuracy * (1 - told.accuracy) / 400))
        assert abs(told.accuracy - expected) <= max(3 * told.error, 0.01), (where, told)


def test_the_distance_of_pictures_is_the_networks_own():
    rng = np.random.default_rng(0)
    pictures, painted = (
        torch.from_numpy(rng.integers(0, 256, (70, 16, 16, 3), dtype=np.uint8)) for _ in "ab"
    )
    network = PerceptualDistance(LABEL_FREE, side=32)
    floats = [p.permute(0, 3, 1, 2).float() / 255 for p in (painted, pictures)]
    with torch.no_grad():
        expected = network(*floats).mean().item()
    mine = tokenizer_scores.distance_under(network, pictures, painted)
    assert mine == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_table_holds_what_it_says(tmp_path, monkeypatch, capsys):
    """On few stills, and with the label-free network alone: k-means and the shipped dVAE."""
    full = tokenizer_scores.stills
    monkeypatch.setattr(
        tokenizer_scores, "stills", lambda split: tuple(part[::8] for part in full(split))
    )
    monkeypatch.setattr(tokenizer_scores, "NETWORKS", (LABEL_FREE,))
    monkeypatch.setattr(tokenizer_scores, "STRENGTHS", (0.03,))
    path = tokenizer_scores.files.data_folder() / "weights" / "lesson_dvae.safetensors"
    target = tmp_path / "table.json"
    tokenizer_scores.main([f"mine={path}", "--json", str(target)])
    table = json.loads(target.read_text())
    assert list(table) == ["mine", "k-means on cells", "mean colours"]
    assert table["mean colours"]["usage"] is None
    assert table["mine"]["psnr"] > table["mean colours"]["psnr"]
    assert table["mine"]["perceptual"][LABEL_FREE] < table["mean colours"]["perceptual"][LABEL_FREE]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:3] == ["PSNR", "SSIM", LABEL_FREE] and len(printed) == 4
    assert f"{table['mine']['psnr']:.2f}" in printed[1]
    told = Readability(**table["mine"]["what"])
    assert 0.05 < told.accuracy < 0.6 and str(told) in printed[1]


def test_bad_arguments_are_refused():
    for words in (["lesson_dvae"], ["--json"]):
        with pytest.raises(ValueError, match=r"usage: python -m bevt_lib\.tokenizer_scores"):
            tokenizer_scores.main(words)


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tokenizer_scores, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"scikit-learn and scikit-image: pip install .*scores"):
        tokenizer_scores.main([])
