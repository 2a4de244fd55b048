"""Three small widgets: sliders over a picture, by plain ``observe``, which nbval can compare."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random

import ipywidgets
import numpy as np
from PIL import Image

from bevt_lib.model.masking import tube_mask
from bevt_lib.notebook.figures import Rows, describe_id, enlarge, hide_pixels, id_tiles
from bevt_lib.tokenizers.base import FrozenTokenizer


def panel(
    sliders: Mapping[str, ipywidgets.Widget], draw: Callable[..., tuple[np.ndarray, str]], zoom: int
) -> ipywidgets.VBox:
    """Put sliders, by name, over a picture and a line of text that follow them.

    ``draw`` takes the sliders' values by name and gives the picture, uint8 (H, W, 3), each pixel of
    which is shown ``zoom`` times each way, and the text.
    """
    # By itself JupyterLab stretches a picture to the notebook's width.
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(align_self="flex-start"))
    text = ipywidgets.Label()

    def update(_: object = None) -> None:
        shown, text.value = draw(**{name: slider.value for name, slider in sliders.items()})
        buffer = io.BytesIO()
        Image.fromarray(shown.repeat(zoom, axis=0).repeat(zoom, axis=1)).save(buffer, "png")
        picture.value = buffer.getvalue()

    for name, slider in sliders.items():
        slider.description = name
        slider.observe(update, "value")
    update()
    return ipywidgets.VBox([*sliders.values(), text, picture])


def beside(tiles: Iterable[np.ndarray]) -> np.ndarray:
    """Lay uint8 tiles (S, S, 3) side by side, each with a white gap after it."""
    gap = ((0, 0), (0, 4), (0, 0))
    return np.concatenate([np.pad(tile, gap, constant_values=255) for tile in tiles], axis=1)


def mask_explorer(clips: Rows, grid: int, frames_per_step: int = 2):
    """Explore tube masks: clip, share, smallest block, tube length, seed and time.

    ``clips``: uint8 (T, S, S, 3) by name, all of one shape.
    """
    cells, frames = grid * grid, len(next(iter(clips.values())))

    def draw(clip, share, block, tube, seed, time):
        target = max(1, round(share * cells))
        mask = tube_mask((frames // frames_per_step, grid, grid), Random(seed), length=tube,
                         target=target, min_block=min(block, target))  # fmt: skip
        line = f"hidden: {mask.mean():.0%} of all tokens, {mask.any(0).mean():.0%} of a frame"
        return hide_pixels(clips[clip], mask)[time], line

    return panel({
        "clip": ipywidgets.Dropdown(options=list(clips)),
        "share": ipywidgets.FloatSlider(0.5, min=0.1, max=0.9, step=0.1),
        "block": ipywidgets.IntSlider(max(1, round(cells * 16 / 196)), min=1, max=cells // 2),
        "tube": ipywidgets.FloatRangeSlider(value=(0.5, 1.0), min=0.25, max=1.0, step=0.25),
        "seed": ipywidgets.IntSlider(0, min=0, max=20),
        "time": ipywidgets.IntSlider(frames // 2, min=0, max=frames - 1),
    }, draw, zoom=3)  # fmt: skip


def time_slider(rows: Rows):
    """Walk through time over rows of frames uint8 (T, S, S, 3), side by side."""
    frames = len(next(iter(rows.values())))
    size = max(r.shape[1] for r in rows.values())

    def draw(time):
        shown = [enlarge(r[time : time + 1], size)[0] for r in rows.values()]
        return beside(shown), f"t = {time}: {' | '.join(rows)}"

    return panel({"time": ipywidgets.IntSlider(0, min=0, max=frames - 1)}, draw, zoom=2)


def id_explorer(
    tokenizers: Mapping[str, FrozenTokenizer], ids: Mapping[str, np.ndarray], inputs: np.ndarray,
    labels: np.ndarray, names: Sequence[str], start: int = 0,
):  # fmt: skip
    """Look token ids up: tokenizer and id; what it paints, where it occurs, what it stands for.

    ``inputs``: uint8 (N, S, S, 3), of which ``ids`` are by tokenizer, int64 (N, h, w); ``labels``:
    int (N,), indices of ``names``. The picture is :func:`figures.id_tiles`, from left to right.
    """

    def draw(tokenizer, id):
        tiles = id_tiles(tokenizers[tokenizer], inputs, ids[tokenizer], id)
        return beside(tiles), describe_id(ids[tokenizer], id, labels, names)

    last = min(t.vocab_size for t in tokenizers.values()) - 1
    book = ipywidgets.Dropdown(options=list(tokenizers))
    number = ipywidgets.IntSlider(start, min=0, max=last)
    return panel({"tokenizer": book, "id": number}, draw, zoom=2)
