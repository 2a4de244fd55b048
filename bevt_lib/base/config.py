"""Configuration: frozen dataclasses, and errors that name the fix.

A recipe is a value. Batch sizes are *global*: what one optimiser step sees, whatever the number of
processes. Config stops at the commands; the library's classes take plain arguments. The comment
beside a field, or above it where it is long, is the field's text in ``PRESET --help``.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def require(holds: bool, message: str) -> None:
    """Raise ValueError with this message unless something holds."""
    if not holds:
        raise ValueError(message)


def require_one_of(field: str, value: str, *known: str) -> None:
    """Raise ValueError unless a field's value is a known one."""
    require(value in known, f"{field} is one of {', '.join(known)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Model:
    """Architecture of Video Swin; defaults are Swin-B as released."""

    embed_dim: int = 128  # channels of stage 1; they double with each stage
    depths: tuple[int, ...] = (2, 2, 18, 2)  # blocks of each stage
    num_heads: tuple[int, ...] = (4, 8, 16, 32)  # attention heads of each stage
    window: tuple[int, int, int] = (8, 7, 7)  # attention window: time steps, height, width in cells
    patch: tuple[int, int, int] = (2, 4, 4)  # one cell of stage 1: frames, height, width in pixels
    patch_norm: bool = True  # a norm after the patch embedding
    drop_path: float = 0.3  # stochastic depth: share of items for which the last block is skipped
    released_quirks: bool = False  # true: reproduce the released code's quirks (swin.window_plan)
    linear_std: float = 0.02  # standard deviation of a linear layer's start; 0: 1 / sqrt(fan-in)


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """How clips are cut from a video: which frames, which pixels, and in tests how many views."""

    frames: int
    interval: int  # frames between two read ones; without effect if sampling is uniform
    size: int  # side of the square view, pixels
    short: tuple[int, int]  # the short side the model was trained with, pixels: from, to
    sampling: str = "dense"  # or "uniform": spread over the whole video
    clips: int = 1  # views in time
    crops: int = 1  # and in space

    def __post_init__(self) -> None:
        require_one_of("sampling", self.sampling, "dense", "uniform")
        require(self.crops in (1, 3), f"test crops must be 1 or 3, got {self.crops}")
        text = f"uniform sampling has 1 test clip, not {self.clips}: --test-clips 1"
        require(self.sampling == "dense" or self.clips == 1, text)


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read; ``datasets.sources`` decides from where."""

    frames: int = 16  # frames of a clip
    interval: int = 8  # frames between two sampled ones
    size: int = 224  # side of the square crop, pixels
    short: tuple[int, int] = (256, 320)  # the short side after resizing, drawn, pixels: from, to
    jitter: float = 0.0  # images' brightness, contrast, saturation change by up to this share
    # list of the training videos: `path label` a line, or the official list of a data set as
    # data/README.md says; empty: the embedded clips
    video_list: str = ""
    video_root: str = ""  # folder of the videos that the lists name; empty: here
    image_root: str = ""  # folder of class folders of training pictures; empty: the embedded ones
    image_list: str = ""  # `path label` a line under image_root; empty: all of its class folders
    val_list: str = ""  # list of the validation and test videos; empty: the embedded clips
    class_list: str = ""  # labels.json of Something-Something, or class names in order
    checked: tuple[str, ...] = ()  # reports of check_data: what they call bad is left out
    bad_share: float = 0.01  # stop where more of the items seen had to be replaced: 0 to 1
    decoder: str = "auto"  # of videos: pyav, decord; auto: pyav, the faster in bench
    embedded: bool = True  # where no list or root is given, read the embedded clips and pictures
    decoded: bool = False  # keep embedded clips and stills decoded on disk: up to 4.3 GB, faster
    timeout: float = 60.0  # seconds after which reading a file is given up; 0: never
    workers: int = 1  # loader processes per stream and process
    expected_items: int = 0  # items in the first stream's data set, for the plan of a run

    def __post_init__(self) -> None:
        require_one_of("data.decoder", self.decoder, "auto", "pyav", "decord")
        text = f"data.bad_share is a share of the items, 0 to 1, got {self.bad_share}"
        require(0 <= self.bad_share <= 1, text)
        require(self.timeout >= 0, f"data.timeout is 0 or more seconds, got {self.timeout}")

    def clip_spec(self, **tests: Any) -> ClipSpec:
        """Give how clips are cut; ``tests``: the fields of ClipSpec that only tests read."""
        return ClipSpec(
            frames=self.frames, interval=self.interval, size=self.size, short=self.short, **tests
        )


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The frozen tokenizer that names the targets.

    A run takes ``vocab_size`` and ``factor`` from the file that ``weights`` names. Here they stand
    for plans without that file, and for a tokenizer that is to be trained.
    """

    weights: str = ""  # file, or folder of OpenAI's two; empty: the shipped lesson tokenizer
    vocab_size: int = 8192  # token ids
    factor: int = 8  # side of a token in the tokenizer's input, pixels
    fp16: bool = False  # half precision on CUDA, as in DALL-E's own code; changes some ids


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How much is hidden: share of the grid (block masks) and of the time (tubes)."""

    share: float = 0.5  # share of one frame's grid that is hidden, 0 to 1
    tube: tuple[float, float] = (0.5, 1.0)  # a tube's length, share of the time steps: from, to

    def target(self, grid: tuple[int, int]) -> int:
        """Give the number of cells to hide on a (height, width) grid; half by default."""
        return int(self.share * grid[0] * grid[1])


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, cosine to zero, linear warm-up. One of ``steps`` and ``epochs`` gives the length."""

    lr: float  # learning rate at the end of the warm-up
    weight_decay: float = 0.05  # AdamW's, per step and times the rate
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's: share of the old mean and square kept
    clips: int = 0  # global batch: clips per optimiser step
    images: int = 0  # global batch: images (or pictures) per optimiser step
    steps: int = 0  # length of the run in optimiser steps; 0: epochs says
    epochs: float = 0.0  # length in epochs of the first stream's data set; 0: steps says
    warmup: float = 0.0  # in the same unit as the length: steps or epochs
    warmup_start: float = 0.1  # share of the regular rate at step 0
    restarts: tuple[tuple[int, float], ...] = ()  # cosines after it: [[steps, share of lr], ...]
    cosine: bool = True  # false: constant after warm-up
    # length of the cosine in steps, then its last rate is held; 0: the whole run
    cosine_steps: int = 0
    last_share: float = 0.0  # share of lr at which the cosine ends
    stairs: bool = False  # true: the cosine moves per epoch, not per step
    clip_norm: float = 0.0  # largest L2 norm of all gradients; 0: no clipping
    # parameters of another rate or decay: [[part of the name, factor of lr, factor of decay], ...]
    rules: tuple[tuple[str, float, float], ...] = ()
    loss_weights: tuple[float, float] = (1.0, 1.0)  # of the video and the image stream
    ema: float = 0.0  # share of the new weights taken into the average after each step; 0: none

    def __post_init__(self) -> None:
        one = bool(self.steps) != bool(self.epochs)
        require(one, "give the length as optim.steps or optim.epochs, 0 for the other")
        require(self.lr > 0, f"optim.lr must be positive, got {self.lr}")
        empty = self.clips + self.images < 1
        require(not empty, "optim.clips and optim.images are both 0: there is nothing to train")


@dataclass(frozen=True, kw_only=True)
class Run:
    """How this machine runs a recipe. Only the seed changes what is computed, but for rounding."""

    folder: str = ""  # the run's folder, continued if it holds a run; empty: runs/<preset>
    seed: int = 0  # of weights, order, crops, masks and all other draws
    init: str = ""  # file or folder of weights: to start from, or to evaluate
    stop_after: int = 0  # stop after this many steps, the schedule unchanged; 0: at the end
    save_every: int = 100  # steps between checkpoints
    keep: int = 2  # checkpoints kept, the latest ones
    micro_batch: int = 0  # first stream's items per forward pass of a process; 0: its whole share
    threads: int = 0  # torch threads of a CPU process; 0: PyTorch's choice
    test_clips: int = 0  # clips tested, the first ones of the list; 0: all
    # bf16, fp16, fp32 or fp64; auto: fp32 on a CPU, on a GPU bf16, or fp16 where it lacks bf16
    precision: str = "auto"
    checkpoint_activations: bool = False  # less memory for about a third more work, the same bits
    compile: bool = False  # torch.compile of the blocks: minutes at the start, equal to rounding
    deterministic: bool = False  # the same bits in every run on CUDA, but slower
    dry_run: bool = False  # print the plan and the recipe, and stop
    processes: int = 0  # processes to plan for in a dry run; 0: those of this command

    def __post_init__(self) -> None:
        require_one_of("run.precision", self.precision, "auto", "bf16", "fp16", "fp32", "fp64")
        require(min(self.save_every, self.keep) > 0, "run.save_every and run.keep are 1 or more")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all recipes hold."""

    name: str  # of the recipe; runs/<name> is the run's folder by default
    data: Data
    optim: Optim
    run: Run = field(default_factory=Run)

    @property
    def folder(self) -> Path:
        """The run's folder: ``run.folder`` or runs/<name>."""
        return Path(self.run.folder or f"runs/{self.name}")


@dataclass(frozen=True, kw_only=True)
class Pretrain(Recipe):
    """Image-stream or joint pretraining."""

    streams: tuple[str, ...]  # video, image or both; the first one's items make epochs
    model: Model
    tokens: Tokens
    masking: Masking = field(default_factory=Masking)
    keep_token_head: bool = False  # the start's token head is kept; the released code starts fresh
    default_init: str = ""  # weights under data/ to start from when run.init is empty
    needs_init: bool = False  # true: refuse to start from random weights

    @property
    def batches(self) -> dict[str, int]:
        """The items of each stream per optimiser step."""
        sizes = {"video": self.optim.clips, "image": self.optim.images}
        return {stream: sizes[stream] for stream in self.streams}


@dataclass(frozen=True, kw_only=True)
class Finetune(Recipe):
    """Supervised recognition of what or how."""

    task: str  # what or how: those labels of the embedded clips; another name: your lists' labels
    num_classes: int  # classes of the lists, numbered from 0
    model: Model
    smoothing: float = 0.0  # label smoothing: share of the target spread over all classes
    dropout: float = 0.0  # share of the features dropped before the head
    flip: bool = True  # mirror every second training clip; not for motions: left would become right
    test_clips: int = 4  # views of a test video in time
    test_crops: int = 3  # views of a test video in space
    views_at_once: int = 32  # views in one forward pass of a test, to bound memory
    val_epochs: float = 0.0  # epochs between two validations, by one view of each clip; 0: none
    crop: str = "random_resized"  # in training: random_resized, or random of the resized frame
    # frames read: dense, data.interval apart; or uniform, one of each of data.frames equal segments
    sampling: str = "dense"
    rand_augment: tuple[int, int] = (0, 0)  # RandAugment in training: operations, magnitude 0 to 30
    erasing: float = 0.0  # share of the training clips in which a box is erased
    antisymmetric: float = 0.0  # share of the 3D patch filters that start (+w, -w) in time
    default_init: str = ""  # weights under data/ to start from when run.init is empty

    def __post_init__(self) -> None:
        operations, magnitude = self.rand_augment
        valid = operations >= 0 and 0 <= magnitude <= 30
        require(valid, "rand_augment is OPERATIONS,MAGNITUDE with a magnitude of 0 to 30")
        share = 0 <= self.erasing <= 1
        require(share, f"erasing is a share of the clips, 0 to 1, got {self.erasing}")
        require(self.views_at_once > 0, f"views_at_once is 1 or more, got {self.views_at_once}")
        require(self.val_epochs >= 0, f"val_epochs is 0 or more, got {self.val_epochs}")

    @property
    def batches(self) -> dict[str, int]:
        """The clips per optimiser step."""
        return {"clip": self.optim.clips}

    @property
    def test_views(self) -> str:
        """The views of a test video in words."""
        return f"{self.test_clips} clips x {self.test_crops} crops, {self.views_at_once} at a time"

    def clip_spec(self) -> ClipSpec:
        """Give how clips are cut, in training and in tests."""
        return self.data.clip_spec(
            sampling=self.sampling, clips=self.test_clips, crops=self.test_crops
        )


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe(Recipe):
    """What both tokenizers' recipes hold. Empty ``data.image_root``: the embedded pictures."""

    tokens: Tokens
    view: int = 0  # side of the tokenizer's input, pixels; 0: as BEVT makes it of a data.size crop
    watch_every: int = 500  # steps between two scores on held-out pictures; 0: at the end only


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer(TokenizerRecipe):
    """A dVAE by the Gumbel-softmax relaxation."""

    hidden: int = 256  # channels of the first group of layers: DALL-E's n_hid
    blocks: int = 2  # residual blocks in each group of layers: DALL-E's n_blk_per_group
    temperature: tuple[float, float] = (1.0, 0.0625)  # of the Gumbel-softmax: start and end
    temperature_steps: int = 0  # steps from start to end; 0: four fifths of optim.steps
    kl_weight: tuple[float, float] = (0.0, 6.6)  # weight of the KL term in the loss: start and end
    kl_steps: int = 0  # steps from start to end; 0: four fifths of optim.steps
    balance_weight: float = 0.0  # weight of using all token ids equally often; not in DALL-E
    quick_start: bool = True  # ours, for short runs: start codes by k-means, branches at full size


@dataclass(frozen=True, kw_only=True)
class TrainPeco(TokenizerRecipe):
    """A VQ-VAE with a perceptual loss."""

    hidden: int = 128  # channels at half the resolution; twice as many below
    blocks: int = 2  # residual blocks at each resolution
    code_dim: int = 256  # numbers in a code
    perceptual: str = "tf_efficientnet_lite0"  # a timm model with features_only, or none
    perceptual_weights: str = ""  # its file; empty: of the two that come with weights
    perceptual_levels: tuple[int, ...] = ()  # timm's out_indices; empty: the model's own
    # side to which pictures are resized for it, pixels; 0: as the tokenizer sees them
    perceptual_side: int = 0
    perceptual_weight: float = 1.0  # weight of the perceptual loss beside the pixels'


RECIPES = (Pretrain, Finetune, TrainTokenizer, TrainPeco)

# Fields, by the beginnings of their names, that mean nothing to a command: not options of it.
UNUSED = {
    "pretrain": ("data.val_list", "data.class_list", "run.test_clips"),
    "finetune": ("data.jitter", "data.image_", "optim.images", "optim.loss_weights"),
    "evaluate": (
        "data.jitter", "data.image_", "data.video_list", "data.bad_share", "data.expected_items",
        "model.drop_path", "model.linear_std", "optim", "smoothing", "dropout", "flip", "crop",
        "rand_augment", "erasing", "val_epochs", "antisymmetric", "default_init", "run.stop_after",
        "run.save_every", "run.keep", "run.micro_batch", "run.precision", "run.checkpoint_",
        "run.compile"),
    "train_tokenizer": (
        "data.frames", "data.interval", "data.jitter", "data.video_", "data.image_list",
        "data.val_list", "data.class_list", "tokens.weights", "tokens.fp16", "optim.clips",
        "optim.loss_weights", "run.init", "run.test_clips"),
}  # fmt: skip


def flatten(recipe: Any, prefix: str = "") -> dict[str, Any]:
    """List a recipe's fields as {"section.field": value}, in order."""
    flat: dict[str, Any] = {}
    for name, value in vars(recipe).items():
        section = dataclasses.is_dataclass(value)
        flat |= flatten(value, f"{prefix}{name}.") if section else {prefix + name: value}
    return flat
