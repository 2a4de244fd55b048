"""OpenAI's tokenizer files: modules as torch 1.7 pickled them, and what users have instead."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import attr
import dall_e
import pytest
import torch
from safetensors import safe_open

from bevt_lib import pretrain
from bevt_lib.cli import run_command
from bevt_lib.convert_weights import TOKENIZER_FILE, convert
from bevt_lib.model.bevt import BEVT
from bevt_lib.tokenizers import dalle, load
from bevt_lib.tokenizers.load import load_tokenizer
from bevt_lib.weights.formats import export

# What modules of torch 1.7 hold: later ones hold more.
OLD = {"_parameters", "_buffers", "_non_persistent_buffers_set", "_backward_hooks",
       "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks",
       "_modules"}  # fmt: skip


def make(kind, seed=0, **changes):
    """OpenAI's module, narrow, with weights of its own."""
    torch.manual_seed(seed)
    with attr.validators.disabled():
        settings = {"n_hid": 16, "n_blk_per_group": 1, "vocab_size": 32} | changes
        module = kind(**settings, **({"n_init": 8} if kind is dall_e.Decoder else {}))
    for p in module.parameters():
        p.data.add_(0.2 * torch.randn(p.shape))  # biases, too
    return module


def age(module, kept=OLD):
    """Take what later versions of torch added out of every module."""
    for part in module.modules():
        for name in [n for n in vars(part) if n.startswith("_") and n not in kept]:
            del part.__dict__[name]
        part.__dict__.pop("recompute_scale_factor", None)
    return module


@pytest.fixture
def pictures():
    small = torch.randint(0, 256, (5, 6, 4, 3), generator=torch.Generator().manual_seed(3))
    return small.to(torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2)


@torch.no_grad()
def ids_of(encoder, pictures):
    """Ids by the package's own code, one picture after another."""
    x = dall_e.map_pixels(pictures.permute(0, 3, 1, 2).float() / 255)
    return torch.cat([encoder(picture[None]).argmax(1) for picture in x])


@pytest.fixture
def parts():
    return make(dall_e.Encoder), make(dall_e.Decoder, seed=1)


@pytest.fixture
def folder(parts, tmp_path):
    for module, name in zip(parts, load.FILES, strict=True):
        torch.save(module, tmp_path / name)
    return tmp_path


def sums(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.pkl")}


def header(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["dalle"])


@pytest.mark.parametrize("kept", [OLD, {"_parameters", "_modules", "_buffers"}, None])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_pickled_modules_load_old_ones_as_well(parts, folder, pictures, kept, requires_grad):
    expected = ids_of(parts[0], pictures)
    assert len(expected.unique()) > 8
    with torch.no_grad():
        one_hot = torch.nn.functional.one_hot(expected, 32).permute(0, 3, 1, 2).float()
        mean, spread = parts[1](one_hot).chunk(2, 1)
    for module, name in zip(parts, load.FILES, strict=True):
        module.requires_grad_(requires_grad)
        torch.save(module if kept is None else age(module, kept), folder / name)
    for _ in range(2):  # from the pickles, then from what was made of them
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.vocab_size, tokenizer.factor) == (32, 8)
        assert torch.equal(tokenizer.encode(pictures), expected)
        painted = tokenizer.decode(expected).permute(0, 3, 1, 2) / 255
        own = dall_e.unmap_pixels(dalle.expected_pixels(mean, spread))
        assert (painted - own).abs().max() <= 0.5 / 255 + 1e-5
        assert not any(p.requires_grad for p in tokenizer.parameters())
    assert header(folder / load.CONVERTED)["sources"] == sums(folder)


def test_pickles_are_converted_once_and_anew_when_they_change(folder, pictures, monkeypatch):
    first = load_tokenizer(folder).encode(pictures)
    reads = []
    read = load.files.read_pickle
    monkeypatch.setattr(
        load.files, "read_pickle", lambda path, c: reads.append(path) or read(path, c)
    )
    assert torch.equal(load_tokenizer(folder).encode(pictures), first) and not reads
    other = make(dall_e.Encoder, seed=5)
    torch.save(other, folder / "encoder.pkl")
    assert torch.equal(load_tokenizer(folder).encode(pictures), ids_of(other, pictures))
    assert len(reads) == 2 and header(folder / load.CONVERTED)["sources"] == sums(folder)
    assert not torch.equal(ids_of(other, pictures), first)
    for name in load.FILES:  # what was made of them is enough, by its folder or its name
        (folder / name).unlink()
    for path in (folder, folder / load.CONVERTED):
        assert torch.equal(load_tokenizer(path).encode(pictures), ids_of(other, pictures))
    assert {p.name for p in folder.iterdir() if p.suffix != ".lock"} == {load.CONVERTED}


def test_damage_to_the_converted_file_is_seen(folder, pictures):
    expected = load_tokenizer(folder).encode(pictures)
    path = folder / load.CONVERTED
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged|not a readable safetensors") as caught:
            load_tokenizer(path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)
        assert torch.equal(load_tokenizer(folder).encode(pictures), expected)  # made anew
        assert torch.equal(load_tokenizer(path).encode(pictures), expected)


def test_an_encoder_alone_encodes_but_does_not_paint(parts, folder, pictures):
    for path in (folder / "encoder.pkl", folder):
        (folder / "decoder.pkl").unlink(missing_ok=True)
        tokenizer = load_tokenizer(path)
        assert torch.equal(tokenizer.encode(pictures), ids_of(parts[0], pictures))
        with pytest.raises(ValueError, match=r"without its decoder.*decoder\.pkl"):
            tokenizer.decode(torch.zeros(1, 2, 2, dtype=torch.int64))
    assert (folder / "encoder.pkl.safetensors").exists()


def test_the_encoder_inside_a_released_checkpoint_serves(parts, pictures, tmp_path):
    model = BEVT(vocab_size=32, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1),
                 window=(2, 7, 7))  # fmt: skip
    state, _ = export(model.state_dict(), "bevt", parts[0].state_dict())
    torch.save({"state_dict": state}, tmp_path / "released.pth")
    convert(tmp_path / "released.pth", tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model" / TOKENIZER_FILE)
    assert tokenizer.vocab_size == 32
    assert torch.equal(tokenizer.encode(pictures), ids_of(parts[0], pictures))
    with pytest.raises(ValueError, match="without its decoder"):
        tokenizer.decode(torch.zeros(1, 2, 2, dtype=torch.int64))


class Hostile:
    """Unpickled with trust it runs a command."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("inside", [False, True])
def test_no_code_of_a_pickle_runs(folder, inside):
    mark, path = folder / "owned", folder / "encoder.pkl"
    bait = make(dall_e.Encoder)
    bait.note = Hostile(mark)
    torch.save(bait if inside else Hostile(mark), path)
    for place in (path, folder):
        with pytest.raises(ValueError, match=r"encoder\.pkl is refused: .*system") as caught:
            load_tokenizer(place)
        assert "\n" not in str(caught.value)
    assert not mark.exists() and not list(folder.glob("*.safetensors"))
    torch.load(path, weights_only=False)  # it is hostile: trusted, it runs
    assert mark.exists()


WGET_LOG = """--2024-05-01 12:00:00--  https://cdn.openai.com/dall-e/encoder.pkl
Resolving cdn.openai.com (cdn.openai.com)... 13.107.213.51
Saving to: 'encoder.pkl.1'
"""


def spoil(folder, case):
    """Put what users have in the place of the encoder or decoder."""
    encoder, decoder = folder / "encoder.pkl", folder / "decoder.pkl"
    if case == "cut short":
        encoder.write_bytes(encoder.read_bytes()[:20_000])
    elif case == "decoder cut short":
        decoder.write_bytes(decoder.read_bytes()[:20_000])
    elif case == "old pickle":
        torch.save(make(dall_e.Encoder), encoder, _use_new_zipfile_serialization=False)
    elif case == "web page":
        encoder.write_text("\n<!DOCTYPE html><html><title>403 Forbidden</title></html>")
    elif case == "log":
        encoder.write_text(WGET_LOG)
    elif case == "empty":
        encoder.write_bytes(b"")
    elif case == "encoder twice":
        decoder.write_bytes(encoder.read_bytes())
    elif case == "decoder twice":
        encoder.write_bytes(decoder.read_bytes())
    elif case == "a state dict":
        torch.save(make(dall_e.Encoder).state_dict(), encoder)
    elif case == "another network":
        torch.save(torch.nn.Sequential(torch.nn.ReLU()), encoder)
    elif case == "no tensors":
        module = make(dall_e.Encoder)
        del module.blocks.__dict__["_modules"]
        torch.save(module, encoder)
    elif case == "another vocabulary":
        torch.save(make(dall_e.Decoder, vocab_size=16), decoder)
    elif case == "another width":
        torch.save(make(dall_e.Decoder, n_hid=32), decoder)
    elif case == "a layer less":
        for kind, path in ((dall_e.Encoder, encoder), (dall_e.Decoder, decoder)):
            module = make(kind, n_blk_per_group=2)
            del module.blocks.group_2.block_2
            torch.save(module, path)


CASES = {
    "cut short": r"encoder\.pkl is damaged .*copy it again",
    "decoder cut short": r"decoder\.pkl is damaged",
    "old pickle": r"encoder\.pkl is an old pickle, not a zip .*wget -O encoder\.pkl https://cdn",
    "web page": r"begins with '<!DOCTYPE html>.*a web page, or .* wget -O encoder\.pkl",
    "log": r"begins with '--2024-05-01 .* the log that wget -o writes\? fetch it again: wget -O",
    "empty": r"begins with ''",
    "encoder twice": r"decoder\.pkl holds a Encoder, not DALL-E's Decoder; .*/decoder\.pkl$",
    "decoder twice": r"encoder\.pkl holds a Decoder, not DALL-E's Encoder",
    "a state dict": r"encoder\.pkl holds a OrderedDict",
    "another network": r"encoder\.pkl holds a Sequential",
    "no tensors": r"encoder\.pkl holds a broken Encoder",
    "another vocabulary": r"'vocab_size': 32.*decoder\.blocks\.input\.w",
    "another width": r"'hidden': 16.*has shape .*, expected",
    "a layer less": r"'blocks': 2.*missing 16 \(decoder\.blocks\.group_2\.block_2",
}


@pytest.mark.parametrize("case", CASES)
def test_another_file_is_told_in_one_line_at_the_command_line(folder, case, monkeypatch, capsys):
    spoil(folder, case)
    with pytest.raises(ValueError, match=CASES[case]):
        load_tokenizer(folder)
    monkeypatch.setattr(sys, "argv", ["pretrain", "lesson_image", "--tokens.weights", str(folder),
                                      "--run.folder", str(folder / "run")])  # fmt: skip
    with pytest.raises(SystemExit) as status:
        run_command(pretrain.main)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert status.value.code == 2 and line.startswith("error: ") and str(folder) in line
    assert not list(folder.glob("*.safetensors")) and not list(folder.glob("*.part"))


@pytest.mark.slow
def test_the_command_as_a_process_says_no_more(folder):
    (folder / "encoder.pkl").write_text(WGET_LOG)
    command = [sys.executable, "-m", "bevt_lib.pretrain", "lesson_image", "--tokens.weights",
               str(folder / "encoder.pkl"), "--run.folder", str(folder / "run")]  # fmt: skip
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (line,) = told.stderr.strip().splitlines()
    assert told.returncode == 2 and line.startswith("error: ") and "wget -O" in line


CONVERT_SLOWLY = """
import sys, time
from bevt_lib.tokenizers import load
from bevt_lib.tokenizers.load import load_tokenizer
read = load.files.read_pickle
def slowly(path, classes):
    print("read", path.name, flush=True)
    time.sleep(1)
    return read(path, classes)
load.files.read_pickle = slowly
print("ready", flush=True)
sys.stdin.readline()
print(len(load_tokenizer(sys.argv[1]).state_dict()))
"""


@pytest.mark.slow
def test_of_two_processes_one_converts_and_both_load(folder):
    command = [sys.executable, "-c", CONVERT_SLOWLY, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    told = sorted(child.communicate(timeout=60)[0].split("\n") for child in children)
    tensors = str(len(load_tokenizer(folder).state_dict()))
    assert told == [[tensors, ""], ["read encoder.pkl", "read decoder.pkl", tensors, ""]]


@contextlib.contextmanager
def not_as_root():
    """Root may write anywhere: be nobody meanwhile."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.name == "nt", reason="folders have no such mode there")
def test_a_folder_that_cannot_be_written_is_read_anew_and_says_so(parts, pictures, capsys):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for module, file in zip(parts, load.FILES, strict=True):
            torch.save(module, folder / file)
        folder.chmod(0o555)
        with not_as_root():
            tokenizer = load_tokenizer(folder)
        assert torch.equal(tokenizer.encode(pictures), ids_of(parts[0], pictures))
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "can't write" in line and "read anew on every start" in line and name in line
        folder.chmod(0o755)
        assert sorted(p.name for p in folder.iterdir()) == sorted(load.FILES)
        load_tokenizer(folder)  # somebody who may writes it, for all
        folder.chmod(0o555)
        with not_as_root():
            load_tokenizer(folder)
        assert not capsys.readouterr().err
        folder.chmod(0o755)


def test_one_setting_switches_the_tokenizer_of_a_run(folder, tmp_path, capsys):
    """Vocabulary, input, plan and record follow the file; a run isn't resumed with another one."""
    run = tmp_path / "run"
    options = ["lesson_image", "--tokens.weights", str(folder), "--optim.images", "2"]
    place = ["--run.folder", str(run), "--data.workers", "0", "--run.stop-after"]
    pretrain.main([*options, "--run.dry-run"])
    assert f"tokenizer {folder}: 32 tokens of 8 px" in " ".join(capsys.readouterr().out.split())
    pretrain.main([*options, *place, "1"])
    told = json.loads((run / "config.json").read_text())
    assert (told["tokens.vocab_size"], told["tokens.factor"]) == (32, 8)
    with safe_open(run / "model" / "model.safetensors", "pt") as file:
        assert file.get_slice("token_head.weight").get_shape()[0] == 32
    pretrain.main([*options, *place, "2"])
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    torch.save(make(dall_e.Encoder, seed=7), folder / "encoder.pkl")
    with pytest.raises(ValueError, match=r"another configuration \(tokens\.sha256"):
        pretrain.main([*options, *place, "3"])


def test_a_plan_without_the_file_says_what_it_assumes(tmp_path, capsys):
    pretrain.main(["paper_image", "--tokens.weights", str(tmp_path / "dalle"), "--run.dry-run"])
    told = " ".join(capsys.readouterr().out.split())
    assert "dalle, not there yet: 8,192 tokens of 8 px" in told and "53,786,240" in told
