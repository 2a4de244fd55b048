"""What tokenizers are worth, side by side: ``python -m bevt_lib.tokenizer_scores [NAME=FILE ...]``.

Without files it scores the shipped ones. Beside them stand two trivial painters: each 8x8 cell in
its mean colour, and k-means on the cells with 256 codes. All see the embedded test stills as BEVT
shows them to a tokenizer. ``--json FILE`` also writes the table there. Reading *what* from the ids
needs scikit-learn and SSIM scikit-image: ``pip install -e '.[scores]'`` brings both.
"""

import json
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from bevt_lib import cli, presets
from bevt_lib.base import distributed, files
from bevt_lib.datasets import sources
from bevt_lib.tokenizers import base, baselines, load
from bevt_lib.tokenizers.perceptual import LABEL_FREE, SUPERVISED, PerceptualDistance

KMEANS_CODES = 256  # as many as the lesson tokenizers have
SHIPPED = ("lesson_dvae", "lesson_peco")
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # scikit-learn's C, of which one is chosen
NETWORKS = (SUPERVISED, LABEL_FREE)
Labelled = tuple[Tensor, np.ndarray]  # stills or their ids, and the stills' labels


@dataclass(frozen=True)
class Readability:
    """How well a linear classifier reads from the ids *what* is in held-out stills."""

    accuracy: float
    error: float  # standard error of the accuracy, from the number of stills alone

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} ± {self.error:.3f}"


@dataclass(frozen=True)
class Score:
    """One tokenizer on held-out pictures. None where there are no ids."""

    psnr: float  # dB, over all pixels
    ssim: float
    perceptual: dict[str, float]  # by network
    usage: float | None = None  # share of the codebook
    perplexity: float | None = None
    what: Readability | None = None  # from how often each id occurs
    what_where: Readability | None = None  # from which id is where


def ssim(pictures: Tensor, painted: Tensor) -> float:
    """Structural similarity of uint8 pictures (N, h, w, 3), mean over colours and pictures.

    Wang et al. 2004: Gaussian window of 11 x 11, sigma 1.5; places where it fits only.
    """
    from skimage.metrics import structural_similarity

    x, y = (rearrange(p, "n h w c -> h w (n c)").cpu().numpy() for p in (pictures, painted))
    return float(structural_similarity(x, y, gaussian_weights=True, sigma=1.5, data_range=255,
                                       use_sample_covariance=False, channel_axis=2))  # fmt: skip


@torch.no_grad()
def distance_under(network: PerceptualDistance, pictures: Tensor, painted: Tensor) -> float:
    """Average the perceptual distance of uint8 pictures (N, h, w, 3) to what they became."""
    pairs = zip(*(base.to_unit(p).split(base.CHUNK) for p in (painted, pictures)), strict=True)
    return float(torch.cat([network(a, b) for a, b in pairs]).mean())


def read_what(train: Labelled, test: Labelled, vocab: int, *, where: bool) -> Readability:
    """Fit logistic regression to (ids, labels) of training stills; score it on test stills.

    Ids are int64 (N, h, w). Features: how often each id occurs, or with ``where`` which id is at
    each place. The regularisation is chosen by 4-fold cross-validation on the training stills.
    """
    from scipy.sparse import csr_array
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    def features(ids: Tensor) -> csr_array:
        flat = ids.flatten(1).cpu().numpy()
        still, place = np.indices(flat.shape)
        cells = still.ravel(), (flat + vocab * place * where).ravel()
        size = len(flat), vocab * (flat.shape[1] if where else 1)
        return csr_array((np.ones(flat.size), cells), shape=size)

    reader = GridSearchCV(LogisticRegression(max_iter=2000), {"C": STRENGTHS}, cv=4)
    reader.fit(features(train[0]), train[1])
    right = float(reader.score(features(test[0]), test[1]))
    return Readability(right, float(np.sqrt(right * (1 - right) / len(test[1]))))


def stills(split: str) -> Labelled:
    """Give a split's embedded stills as tokenizer input, uint8 (N, 48, 48, 3), and their labels."""
    items = sources.pretraining_items(presets.lesson_image(), "image", split)
    pictures = np.stack([items.sample(0, i)["tokenizer_input"][0] for i in range(len(items))])
    return torch.from_numpy(pictures), np.array([entry.label for entry in items.entries])


def kmeans_codes(pictures: Tensor) -> Tensor:
    """Fit the baseline's codes to the cells of a third of the pictures: float (256, 192)."""
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(KMEANS_CODES, n_init=3, random_state=0, batch_size=4096)
    kmeans.fit(baselines.cells_of(pictures[::3]).numpy())
    return torch.from_numpy(kmeans.cluster_centers_).float()


def compare(paths: dict[str, Path], networks: dict[str, PerceptualDistance]) -> dict[str, Score]:
    """Score tokenizer files and the trivial painters on the embedded test stills: {name: Score}.

    Raises ValueError for a tokenizer whose cells aren't 8x8 pixels: its numbers wouldn't compare.
    """
    (train, train_what), (test, test_what) = stills("train"), stills("test")
    table, device = {}, distributed.device()

    def enter(name: str, painted: Tensor, of_ids: tuple = ()) -> None:
        pair = test.to(device), painted.to(device)
        far = {n: distance_under(network, *pair) for n, network in networks.items()}
        table[name] = Score(base.psnr(*pair), ssim(*pair), far, *of_ids)

    def score_ids(seen: Tensor, ids: Tensor, vocab: int) -> tuple:
        pairs = (seen, train_what), (ids, test_what)
        readable = (read_what(*pairs, vocab, where=where) for where in (False, True))
        return *base.usage(ids, vocab), *readable

    for name, path in paths.items():
        tokenizer = load.load_tokenizer(path).to(device)
        if tokenizer.factor != baselines.FACTOR:
            raise ValueError(f"{path} has {tokenizer.factor} px per id: only 8 are compared")
        seen, ids = (tokenizer.encode(part.to(device)) for part in (train, test))
        enter(name, tokenizer.decode(ids), score_ids(seen, ids.cpu(), tokenizer.vocab_size))
    codes = kmeans_codes(train)
    seen, ids = (baselines.nearest_ids(part, codes) for part in (train, test))
    enter("k-means on cells", baselines.nearest_code(test, codes), score_ids(seen, ids, len(codes)))
    enter("mean colours", baselines.mean_colours(test))
    return table


def write(table: dict[str, Score]) -> str:
    """Write a table as text, one line per tokenizer."""
    networks = next(iter(table.values())).perceptual
    lines = [("", "PSNR", "SSIM", *networks, "usage", "perplexity", "what", "what, where")]
    for name, s in table.items():
        ids = ("-",) * 4
        if s.usage is not None:
            ids = (f"{s.usage:.3f}", f"{s.perplexity:.1f}", str(s.what), str(s.what_where))
        far = (f"{distance:.3f}" for distance in s.perceptual.values())
        lines.append((name, f"{s.psnr:.2f}", f"{s.ssim:.3f}", *far, *ids))
    padded = ([text.ljust(max(map(len, c))) for text in c] for c in zip(*lines, strict=True))
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))


@dataclass
class Options:
    """What the command line says."""

    files: tuple[str, ...]  # NAME=FILE of each tokenizer; none: the shipped ones
    json: str = ""  # file to write the table into, too


def main(arguments: list[str]) -> None:
    """Read the command line, print the table."""
    given = cli.parse(Options, arguments, "python -m bevt_lib.tokenizer_scores", __doc__ or "")
    pairs = [word.partition("=") for word in given.files]
    if not all(path for _, _, path in pairs):
        raise ValueError("usage: python -m bevt_lib.tokenizer_scores [NAME=FILE ...] [--json FILE]")
    if not (find_spec("sklearn") and find_spec("skimage")):
        raise ValueError("scores need scikit-learn and scikit-image: pip install -e '.[scores]'")
    shipped = {n: files.data_folder() / "weights" / f"{n}.safetensors" for n in SHIPPED}
    networks = {n: PerceptualDistance(n, side=96) for n in NETWORKS}  # the lesson models' crop
    table = compare({n: Path(path) for n, _, path in pairs} or shipped, networks)
    print(write(table))
    if given.json:
        Path(given.json).write_text(json.dumps(table, indent=1, default=asdict) + "\n")


if __name__ == "__main__":
    cli.run_command(main)
