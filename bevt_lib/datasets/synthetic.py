"""Renders the embedded *what / how* clips: real video files with two independent labels.

A scene is a landscape photo, mirrored into a seamless torus, with one cut-out pasted in; a camera
moves over it. *What* is the kind of cut-out: one frame is enough, as on Kinetics. *How* is the
camera's motion: no single frame is enough, as on Something-Something. Position on the torus,
log-scale and angle start uniformly in every clip whatever its class, scale and angle run as
wrapping sawtooths, and only the sign of one velocity is the label: motion is stationary, so that
every single frame looks alike under all labels.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from bevt_lib.base.files import data_folder, replace_file
from bevt_lib.base.seeds import Purpose, numpy_generator
from bevt_lib.datasets.video import write_video

KINDS = ("bird", "bug", "drink", "flower", "fruit", "house", "sign", "sweet")
MOTIONS = ("left", "right", "up", "down", "approach", "recede", "clockwise", "anticlockwise")
CLASSES = {"what": KINDS, "how": MOTIONS}  # of the two tasks

SIDE = 112  # pixels of a rendered frame
FRAMES = 16
TILE = 208  # period of the torus: twice the photo's height
CUTOUT = 68  # longest side of a pasted cut-out, pixels
PAN = (2.2, 4.2)  # pixels a frame
ZOOM = (0.03, 0.055)  # log-scale a frame
ROLL = (0.05, 0.09)  # radians a frame
LOG_SCALE = (-0.35, 0.45)  # range of the sawtooth
ANGLE = (-0.6, 0.6)
CONTRAST = 45.0  # least distance between the mean colours of cut-out and photo, 0 to 442

# Clips and stills per split; clips are whole rounds over the 64 pairs of labels.
CLIPS = {"train": 5120, "val": 256, "test": 1024, "test_unseen": 512}
STILLS = {"train": 3072, "val": 256, "test": 512}
PHOTOS = {"train": 138, "val": 20, "test": 40}  # of 198; test_unseen shares the test photos
UNSEEN = 4  # cut-outs of each kind held out for test_unseen, less those that recur under two names
SEED = 2022
RENDERING = 2  # raise it when the code here or in write_video changes what is written


class Scene(NamedTuple):
    """What one clip shows, drawn by seed; all but the velocity is independent of the motion."""

    photo: str  # file name
    cutout: str
    kind: int
    motion: int  # index of MOTIONS
    tile: np.ndarray  # uint8 (TILE, TILE, 3), seamless
    start: np.ndarray  # x, y (pixels), log-scale, angle
    velocity: np.ndarray  # the same per frame; one entry is not zero


@lru_cache
def photo_splits() -> dict[str, list[Path]]:
    """Divide the photos among the splits; none is in two, but test_unseen has the test photos."""
    photos = sorted((data_folder() / "photos").glob("*.jpg"))
    order = numpy_generator(SEED, Purpose.SPLIT, 0).permutation(len(photos))
    parts = np.split(order, np.cumsum(list(PHOTOS.values())))
    splits = {s: sorted(photos[i] for i in part) for s, part in zip(PHOTOS, parts, strict=False)}
    return splits | {"test_unseen": splits["test"]}


@lru_cache
def cutout_splits() -> dict[str, list[list[Path]]]:
    """List the cut-outs by kind: of the main splits ("seen") and held out ("unseen")."""
    splits: dict[str, list[list[Path]]] = {"seen": [], "unseen": []}
    for number, kind in enumerate(KINDS):
        paths = sorted((data_folder() / "cutouts" / kind).glob("*.webp"))
        order = numpy_generator(SEED, Purpose.SPLIT, 1, number).permutation(len(paths))
        seen = sorted(paths[i] for i in order[UNSEEN:])
        # The source holds some pictures under two names: what is seen under one isn't unseen.
        known = {path.read_bytes() for path in seen}
        held_out = (paths[i] for i in order[:UNSEEN])
        splits["unseen"].append(sorted(p for p in held_out if p.read_bytes() not in known))
        splits["seen"].append(seen)
    return splits


@lru_cache(maxsize=512)
def _picture(path: Path) -> np.ndarray:
    """Read a picture as uint8 RGB or RGBA."""
    picture = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if picture is None:
        raise ValueError(f"{path}: is not a readable picture; restore the clone's data folder")
    code = cv2.COLOR_BGRA2RGBA if picture.shape[2] == 4 else cv2.COLOR_BGR2RGB
    return cv2.cvtColor(picture, code)


def draw_scene(split: str, index: int, kind: int, motion: int) -> Scene:
    """Draw a clip's scene: a photo of its split, a cut-out of its kind, starts and velocity."""
    rng = numpy_generator(SEED, Purpose.RENDER, list(CLIPS).index(split), index)
    names = cutout_splits()["unseen" if split == "test_unseen" else "seen"][kind]
    name = names[rng.integers(len(names))]
    cutout = _picture(name)
    if rng.random() < 0.5:
        cutout = cutout[:, ::-1]
    photos = photo_splits()[split]
    for _ in range(8):  # until the cut-out stands out
        photo = photos[rng.integers(len(photos))]
        picture = _picture(photo)
        colour = cutout[cutout[..., 3] > 127][:, :3].mean(0)
        if np.linalg.norm(colour - picture.mean((0, 1))) > CONTRAST:
            break
    tile = _paste(_torus(picture, rng), cutout, rng)
    low, high = np.array([(0, TILE), (0, TILE), LOG_SCALE, ANGLE]).T
    speed = [rng.uniform(*bounds) for bounds in (PAN, PAN, ZOOM, ROLL)]
    velocity = np.zeros(4)
    # The scene moves left when the camera moves right. On screen y points down.
    velocity[motion // 2] = speed[motion // 2] * (-1) ** motion
    return Scene(photo.name, name.name, kind, motion, tile, rng.uniform(low, high), velocity)


def _torus(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror a square of a photo into a tile that continues itself on every side."""
    side = photo.shape[0]
    left = rng.integers(photo.shape[1] - side + 1)
    square = photo[:, left : left + side]
    half = np.concatenate([square, square[:, ::-1]], axis=1)
    return cv2.resize(np.concatenate([half, half[::-1]]), (TILE, TILE))


def _paste(tile: np.ndarray, cutout: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paste a cut-out four times, one in each quarter, so that every frame shows one."""
    scale = CUTOUT / max(cutout.shape[:2]) * rng.uniform(0.9, 1.1)
    size = [max(2, round(side * scale)) for side in cutout.shape[1::-1]]
    cutout = cv2.resize(cutout, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    alpha = cutout[..., 3:] / 255
    out = tile.astype(np.float32)
    origin = rng.integers(0, TILE, 2)
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        place = origin + np.array(corner) * (TILE // 2) + rng.integers(-8, 9, 2)
        rows = np.arange(place[0], place[0] + cutout.shape[0])[:, None] % TILE
        columns = np.arange(place[1], place[1] + cutout.shape[1])[None] % TILE
        out[rows, columns] = out[rows, columns] * (1 - alpha) + cutout[..., :3] * alpha
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def render_clip(scene: Scene, frames: int = FRAMES) -> np.ndarray:
    """Film a scene: uint8 (frames, SIDE, SIDE, 3), RGB."""
    return np.stack([_frame(scene, t) for t in range(frames)])


def _frame(scene: Scene, time: int) -> np.ndarray:
    """Render the scene at one time: wrap position, log-scale and angle, then warp."""
    x, y, log_scale, angle = scene.start + scene.velocity * time
    scale, angle = np.exp(-_wrap(log_scale, LOG_SCALE)), _wrap(angle, ANGLE)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    turn = np.array([[cos, sin], [-sin, cos]])
    centre = np.array([x % TILE, y % TILE]) + TILE
    warp = np.column_stack([turn, centre - turn @ np.full(2, (SIDE - 1) / 2)])
    around = np.tile(scene.tile, (3, 3, 1))
    return cv2.warpAffine(around, warp, (SIDE, SIDE), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def _wrap(value: float, bounds: tuple[float, float]) -> float:
    return bounds[0] + (value - bounds[0]) % (bounds[1] - bounds[0])


def labels(split: str, index: int) -> tuple[int, int]:
    """Give (what, how) of a clip: every 64 clips hold every pair once."""
    return index % len(KINDS), index // len(KINDS) % len(MOTIONS)


def render(folder: Path | None = None, workers: int = 2) -> Path:
    """Render all splits once and return their folder; what is there already is kept.

        clips/<split>/00000.mp4          images/<split>/<kind>/00000.jpg
        what_<split>.txt, how_<split>.txt   Kinetics-style lists, `path label`

    By default under rendered/ in the data folder. After an interruption it continues with the next
    split. Raises ValueError where it can't write.
    """
    parent = Path(folder) if folder else data_folder() / "rendered"
    target = parent / version()
    finished = target / "finished"
    if finished.exists():
        return target
    try:
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(target / "lock"), ProcessPoolExecutor(workers) as pool:
            for split, count in CLIPS.items():
                _all(pool, partial(_write_clip, split), count, target / "clips" / split)
                _write_lists(target, split, count)
            for split, count in STILLS.items():
                _all(pool, partial(_write_still, split), count, target / "images" / split)
            finished.touch()
    except OSError as error:
        what = f"can't write the rendered clips to {parent} ({error.strerror})"
        fix = "make it writable, or point BEVT_DATA at a copy of the data folder with 200 MB free"
        raise ValueError(f"{what}: {fix}") from None
    return target


def version() -> str:
    """Name the rendering after its constants and pictures: if they change, so does the name."""
    names = [[p.name for p in kind] for part in cutout_splits().values() for kind in part]
    constants = (SIDE, FRAMES, TILE, CUTOUT, PAN, ZOOM, ROLL, LOG_SCALE, ANGLE, CONTRAST)
    text = json.dumps([constants, CLIPS, STILLS, PHOTOS, UNSEEN, SEED, RENDERING, names])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _all(pool: Executor, write: Callable[[Path, int], None], count: int, place: Path) -> None:
    """Write ``count`` items into a hidden folder and rename it when all are there.

    ``write`` writes the item of a number into a folder. What is there already is kept.
    """
    if place.exists():
        return
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    done = pool.map(partial(write, part), range(count), chunksize=32)
    list(tqdm(done, total=count, desc=f"{place.name} {place.parent.name}", mininterval=1))
    part.rename(place)


def _write_clip(split: str, folder: Path, index: int) -> None:
    what, how = labels(split, index)
    write_video(folder / f"{index:05d}.mp4", render_clip(draw_scene(split, index, what, how)))


def _write_still(split: str, folder: Path, index: int) -> None:
    """Write one frame of a scene of its own: indices beyond the clips'."""
    what, how = labels(split, index)
    scene = draw_scene(split, CLIPS[split] + index, what, how)
    (folder / KINDS[what]).mkdir(exist_ok=True)
    picture = cv2.cvtColor(render_clip(scene, 1)[0], cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
    encoded.tofile(folder / KINDS[what] / f"{index:05d}.jpg")


def _write_lists(target: Path, split: str, count: int) -> None:
    """Write the two lists of a split."""
    for which, task in enumerate(("what", "how")):
        lines = [f"clips/{split}/{i:05d}.mp4 {labels(split, i)[which]}\n" for i in range(count)]
        with replace_file(target / f"{task}_{split}.txt") as part:
            part.write_text("".join(lines))
