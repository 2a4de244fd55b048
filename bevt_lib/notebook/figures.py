"""Figures for the notebooks. Every function returns the figure or the arrays it shows."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image

from bevt_lib.base.trainable import collate
from bevt_lib.model.bevt import BEVT
from bevt_lib.model.masking import mask_in_time
from bevt_lib.tokenizers.base import FrozenTokenizer, add_tokens
from bevt_lib.training.run_folder import read_metrics

GREY = np.array([128, 128, 128], dtype=np.uint8)
Curve = tuple[np.ndarray, np.ndarray]  # steps int64, values float64
Rows = Mapping[str, np.ndarray]  # frames by name, uint8 (T, H, W, 3)


def has_cut(frames: np.ndarray) -> bool:
    """Tell whether a clip, uint8 (T, H, W, 3), has a cut: a change over twice the median change.

    A change is the mean absolute difference of two neighbouring frames.
    """
    changes = np.abs(np.diff(frames.astype(int), axis=0)).mean(axis=(1, 2, 3))
    return bool(changes.max() > 2 * np.median(changes))


def draw_clips(
    read: Callable[[int], np.ndarray], total: int, number: int, seed: int
) -> tuple[list[int], int]:
    """Draw ``number`` of ``total`` clips to show, by seed, and pass over those with a cut.

    ``read`` gives a clip's frames by its index. Returns the indices, and how many were passed
    over. Raises ValueError where too few are without a cut.
    """
    drawn: list[int] = []
    for tried, index in enumerate(np.random.default_rng(seed).permutation(total).tolist(), 1):
        if not has_cut(read(index)):
            drawn.append(index)
        if len(drawn) == number:
            return drawn, tried - number
    raise ValueError(f"{len(drawn)} of {total} clips are without a cut, {number} were asked for")


def enlarge(cells: np.ndarray, size: int) -> np.ndarray:
    """Repeat the cells of (T, h, w, ...) so that each frame is ``size`` pixels high and wide."""
    rows = cells.repeat(size // cells.shape[1], axis=1)
    return rows.repeat(size // cells.shape[2], axis=2)


def hide_pixels(frames: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Grey out hidden cells: frames uint8 (T, H, W, 3), mask bool (T or D, h, w), True = hidden."""
    mask = mask.repeat(len(frames) // len(mask), axis=0)
    return np.where(enlarge(mask, frames.shape[1])[..., None], GREY, frames)


def colours_of_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Give each id a colour of its own: (T, h, w) to uint8 (T, h, w, 3)."""
    palette = plt.get_cmap("hsv")(np.random.default_rng(0).permutation(vocab_size) / vocab_size)
    return (palette[ids][..., :3] * 255).astype(np.uint8)


def show_rows(
    rows: Rows, *, every: int = 1, width: float = 11.0, titles: Sequence[str] | None = None
) -> Image:
    """Draw one row of frames for each named uint8 (T, H, W, 3), time from left to right.

    ``titles`` stand above the columns where they are not frames in time (None: t=0, t=1, ...).
    Returns a JPEG to display: as PNG, photos would make a notebook several times larger.
    """
    columns = max(len(r[::every]) for r in rows.values())
    side = min(width / columns, 2.2)
    margin = 0.3 + 0.09 * max(map(len, rows))  # inches: room for the longest name
    size = side * columns + margin, side * len(rows) + 0.25
    # One line of pictures for each name, which stands to the left.
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for line, (name, frames) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, number in zip(line, range(0, len(frames), every), strict=False):
            axis.imshow(frames[number], interpolation="nearest")
            if name == next(iter(rows)):
                title = titles[number] if titles else f"t={number}" if columns > 1 else ""
                axis.set_title(title, fontsize=9)
        line[0].annotate(name, (0, 0.5), (-6, 0), "axes fraction", "offset points", ha="right",
                         va="center", fontsize=10)  # fmt: skip
    # Lay out by hand: the longest name just fits.
    figure.subplots_adjust(left=margin / size[0], right=0.995, top=1 - 0.25 / size[1],
                           bottom=0.01, wspace=0.04, hspace=0.06)  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=80, pil_kwargs={"quality": 75})
    plt.close(figure)
    return Image(buffer.getvalue(), format="jpeg")


def typical_cells(
    inputs: np.ndarray, ids: np.ndarray, token_id: int, number: int = 6, margin: int = 8
) -> np.ndarray:
    """Cut out cells that have a token id, those nearest to their mean first, one a picture.

    ``inputs``: uint8 (N, H, W, 3); ``ids``: int64 (N, h, w). Returns uint8 (n, side, side, 3), n at
    most ``number``: the cell in the middle of ``margin`` pixels, which are grey beyond the edge.
    """
    size = inputs.shape[1] // ids.shape[1]
    side = size + 2 * margin
    picture, row, column = np.nonzero(ids == token_id)
    if not len(picture):
        return np.empty((0, side, side, 3), dtype=np.uint8)
    edge = (margin, margin)
    wide = np.pad(inputs[picture], ((0, 0), edge, edge, (0, 0)), constant_values=GREY[0])
    corners = zip(wide, row * size, column * size, strict=True)
    around = np.stack([shown[y : y + side, x : x + side] for shown, y, x in corners])
    cells = around[:, margin : margin + size, margin : margin + size].astype(float)
    order = np.square(cells - cells.mean(axis=0)).sum(axis=(1, 2, 3)).argsort(kind="stable")
    first = np.sort(np.unique(picture[order], return_index=True)[1])
    return around[order[first[:number]]]


def id_tiles(
    tokenizer: FrozenTokenizer, inputs: np.ndarray, ids: np.ndarray, token_id: int, number: int = 6
) -> np.ndarray:
    """Show one token id: uint8 (2 + number, S, S, 3), S the side of ``inputs``, whose are ``ids``.

    First a grid of nothing else, painted; then how often each place has it, from black (never) to
    yellow (the place that has it most); then the most typical cells that have it, framed, each amid
    the eight around it.
    """
    side = inputs.shape[1]
    painted = tokenizer.decode(torch.full((1, *ids.shape[1:]), token_id)).numpy()
    shares = (ids == token_id).mean(axis=0)
    heat = plt.get_cmap("inferno")(0.9 * shares / max(shares.max(), 1e-9))[None, ..., :3] * 255
    cells = typical_cells(inputs, ids, token_id, number, margin=side // ids.shape[1])
    pick = np.arange(side) * cells.shape[1] // side  # the nearest pixel
    tiles = cells[:, pick][:, :, pick]
    low, high = side // 3, side - side // 3
    middle = tiles[:, low:high, low:high].copy()
    for width, colour in ((2, 0), (1, 255)):  # seen on light and on dark
        tiles[:, low - width : high + width, low - width : high + width] = colour
    tiles[:, low:high, low:high] = middle
    blank = np.full((number - len(tiles), side, side, 3), GREY)
    return np.concatenate([painted, enlarge(heat.astype(np.uint8), side), tiles, blank])


def describe_id(ids: np.ndarray, token_id: int, labels: np.ndarray, names: Sequence[str]) -> str:
    """Say in one line how often a token id is used, and in pictures of what most.

    ``ids``: int64 (N, h, w); ``labels``: int (N,), indices of ``names``.
    """
    found = (ids == token_id).sum(axis=(1, 2))
    kinds = np.bincount(labels, weights=found, minlength=len(names)).astype(int)
    most = [f"{names[k]} {kinds[k]}" for k in np.argsort(-kinds, kind="stable")[:3]]
    used = f"{found.sum():,} of {ids.size:,} ids ({found.sum() / ids.size:.2%})"
    pictures = f"{(found > 0).sum():,} of {len(ids):,} pictures"
    return f"id {token_id}: {used}, in {pictures}; most in: {', '.join(most)}"


@torch.no_grad()
def prediction_rows(
    model: BEVT, tokenizer: FrozenTokenizer, stream: str, sample: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], float]:
    """Show what the model thinks is hidden: four rows of frames, and the share it names right.

    Rows, each uint8 (T, S, S, 3): the original, the original with hidden cells greyed, all
    predicted ids painted by the tokenizer, and those painted cells pasted into the visible part.
    The last two are shown at the tokenizer's resolution.
    """
    model.eval()
    part = add_tokens({stream: collate([sample])}, tokenizer)[stream]
    ids = model.predict(stream, part["pixels"], part["mask"])
    hidden = mask_in_time(part["mask"], model.frames_per_step[stream])
    painted = tokenizer.decode(ids[0]).numpy()
    view = sample["tokenizer_input"]
    mask = enlarge(hidden[0].numpy(), view.shape[1])[..., None]
    masked = hide_pixels(sample["pixels"], hidden[0].numpy())
    rows = {"original": sample["pixels"], "masked": masked, "predicted": painted,
            "pasted": np.where(mask, painted, view)}  # fmt: skip
    return rows, float((ids == part["ids"])[hidden].float().mean())


def show_curves(
    curves: Mapping[str, Sequence[float]], *, baselines: Mapping[str, float] | None = None,
    window: int = 25, ylabel: str = "loss (nats)",
) -> plt.Figure:  # fmt: skip
    """Draw curves over steps, averaged over a trailing window, with baselines as dashed lines."""
    figure, axis = plt.subplots(figsize=(7, 3))
    for name, values in curves.items():
        axis.plot(smooth(values, window), label=name)
    for number, (name, value) in enumerate((baselines or {}).items()):
        axis.axhline(value, ls="--", lw=1, color=f"C{7 + number}", label=f"{name}: {value:.2f}")
    return _labelled(figure, window, ylabel)


def _labelled(figure: plt.Figure, window: int, ylabel: str) -> plt.Figure:
    """Label a figure of smoothed curves, with one legend for all its axes."""
    handles = [h for axis in figure.axes for h in axis.get_legend_handles_labels()[0]]
    figure.axes[0].set(xlabel=f"step (mean of the last {window})", ylabel=ylabel)
    figure.axes[0].legend(handles=handles, fontsize=8)
    figure.tight_layout()
    plt.close(figure)
    return figure


def read_run(folder: str | Path) -> dict[str, Curve]:
    """Read every number of a run's metrics.jsonl: {"video/loss": (steps, values), ...}.

    A number may stand at some steps only ("val/top1"). A line that isn't whole, because the
    run was killed or is writing it, ends the record. Raises ValueError where no step is recorded.
    """
    columns: dict[str, dict[int, float]] = {}
    for entry in read_metrics(Path(folder)):
        step = int(entry.pop("step"))
        for name, value in entry.items():
            columns.setdefault(name, {})[step] = value
    if not columns:
        raise ValueError(f"{folder} holds no record of a run: no step in metrics.jsonl")
    return {name: (np.array([*found], dtype=np.int64), np.array([*found.values()], dtype=float))
            for name, found in columns.items()}  # fmt: skip


def show_runs(
    folders: Sequence[str | Path], *, window: int = 25, points: str = "val/top1"
) -> plt.Figure:
    """Draw the losses of runs over steps, a colour a run and a dash a stream, and validations.

    Losses are averaged over a trailing window; ``points`` are marked on an axis of their own, on
    the right. Runs may differ in length and streams; the first is drawn wide, so that curves that
    coincide are seen. See :func:`read_run` for what is read.
    """
    figure, axis = plt.subplots(figsize=(7, 3.5))
    right = None
    for number, folder in enumerate(folders):
        run, label, colour = read_run(folder), Path(folder).name, f"C{number}"
        losses = [name for name in run if name.endswith("/loss") and not name.startswith("val/")]
        for dash, name in zip(("-", "--", ":"), losses, strict=False):
            steps, values = run[name]
            axis.plot(steps, smooth(values, window), dash, color=colour, lw=1.5 if number else 4.0,
                      label=f"{label}: {name.removesuffix('/loss')}")  # fmt: skip
        if points in run:
            right = right or axis.twinx()
            right.plot(*run[points], "o", color=colour, label=f"{label}: {points}")
            right.set_ylabel(points)
    return _labelled(figure, window, "loss (nats)")


def smooth(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Average a curve over a trailing window: float64 (len(values),)."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
