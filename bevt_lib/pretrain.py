"""Pretrain: ``python -m bevt_lib.pretrain PRESET --overrides``, also under torchrun."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch

from bevt_lib.base import distributed, files
from bevt_lib.base.config import ClipSpec, Pretrain, flatten
from bevt_lib.base.files import digest
from bevt_lib.base.seeds import Purpose, Stream, seeded_globals
from bevt_lib.cli import choose, run_command, with_recipe
from bevt_lib.datasets import synthetic
from bevt_lib.datasets.items import Positions, PretrainClips, PretrainImages
from bevt_lib.datasets.lists import leave_out_bad, read_entries, read_image_folder, read_list
from bevt_lib.model.bevt import BEVT
from bevt_lib.model.masking import block_mask, tube_mask
from bevt_lib.presets import PRETRAIN, lesson_dvae
from bevt_lib.scoring import cost
from bevt_lib.scoring.tokens import TokenScore, score_tokens
from bevt_lib.tokenizers.base import Tokenizer, add_tokens
from bevt_lib.tokenizers.dalle import DalleTokenizer, build
from bevt_lib.tokenizers.load import FrozenTokenizer, load_tokenizer
from bevt_lib.training import loop
from bevt_lib.training.loop import Source
from bevt_lib.training.optim import total_steps
from bevt_lib.weights.formats import released_name
from bevt_lib.weights.load import read_weights, start_pretraining

STRIDE = 16  # pixels of the clip per token: Swin's stage 3


def main(arguments: list[str]) -> None:
    """Read the command line, then plan or train."""
    recipe = choose(PRETRAIN, arguments, "pretrain")
    if recipe.run.dry_run:
        print(with_recipe(plan(recipe), recipe))
        return
    with distributed.world():
        model, history = train(recipe)
        if distributed.rank() == 0:
            model.save_pretrained(Path(run_folder(recipe)) / "model")
            last = history[-1]
            print(f"step {last['step'] + 1}: loss {last['loss']:.3f}; run in {run_folder(recipe)}")


def run_folder(recipe: Pretrain) -> str:
    """Give the run's folder: ``run.folder`` or runs/<preset>."""
    return recipe.run.folder or f"runs/{recipe.name}"


def build_model(recipe: Pretrain) -> BEVT:
    """Build the model with weights drawn from the run's seed."""
    d = recipe.data
    with seeded_globals(recipe.run.seed, Purpose.WEIGHTS):
        return BEVT(
            recipe.model, vocab_size=recipe.tokens.vocab_size, streams=recipe.streams,
            views=ClipSpec(frames=d.frames, interval=d.interval, size=d.size, short=d.short),
        )  # fmt: skip


def shipped_tokenizer() -> Path:
    """Find the lesson tokenizer's file."""
    return files.data_folder() / "weights" / "lesson_dvae.safetensors"


def build_tokenizer(recipe: Pretrain) -> FrozenTokenizer:
    """Load the recipe's frozen tokenizer; the shipped lesson tokenizer where none is named.

    Raises ValueError where none is named and the recipe is made for another than the shipped one.
    """
    tokenizer = load_tokenizer(recipe.tokens.weights or shipped_tokenizer()).to(
        distributed.device()
    )
    if not recipe.tokens.weights and sized_for(recipe, tokenizer) != recipe:
        raise ValueError(
            f"{recipe.name} needs a tokenizer of {recipe.tokens.vocab_size} tokens of "
            f"{recipe.tokens.factor} px, and the shipped one has {tokenizer.vocab_size} of "
            f"{tokenizer.factor} px: name its file or folder with --tokens.weights"
        )
    return tokenizer


def sized_for(recipe: Pretrain, tokenizer: Tokenizer) -> Pretrain:
    """Give the recipe with the tokenizer's vocabulary and factor."""
    tokens = replace(recipe.tokens, vocab_size=tokenizer.vocab_size, factor=tokenizer.factor)
    return replace(recipe, tokens=tokens)


def naming_digest(tokenizer: FrozenTokenizer) -> str:
    """Sum up what ids depend on: a run isn't to be resumed with another tokenizer."""
    state = tokenizer.state_dict().items()
    return digest({k: v for k, v in state if not k.startswith("decoder.")})


def start_weights(recipe: Pretrain, model: BEVT) -> str:
    """Load the weights the recipe starts from, if any; return one line that tells what was done.

    Raises ValueError where the recipe needs weights and none are given.
    """
    path = recipe.run.init
    if not path and recipe.default_init:
        path = str(files.data_folder() / recipe.default_init)
    if not path:
        if recipe.needs_init:
            raise ValueError(
                f"{recipe.name} starts from image-stream weights: give them with --run.init FILE"
            )
        return "start: random weights"
    report = start_pretraining(model, read_weights(Path(path)), token_head=recipe.keep_token_head)
    return f"start: {Path(path).name}: {report}"


def hide_blocks(rng: Random, grid: tuple[int, int], target: int) -> np.ndarray:
    """Draw an image's mask: bool (1, h, w)."""
    return block_mask(grid, rng, target=target)[None]


def hide_tubes(
    rng: Random, grid: tuple[int, int, int], target: int, length: tuple[float, float]
) -> np.ndarray:
    """Draw a clip's mask: bool (D, h, w)."""
    return tube_mask(grid, rng, target=target, length=length)


def build_items(recipe: Pretrain, stream: str, split: str = "train"):
    """Build one stream's data set: the embedded one, or the paths of the recipe.

    ``split`` is "train", "val" or "test" of the embedded data; the recipe's own paths are for
    training.
    """
    d = recipe.data
    side = d.size // STRIDE
    if d.size % (2 * STRIDE):
        raise ValueError(
            f"data.size {d.size}: the decoder needs a multiple of 32 px, such as "
            f"{max(64, 32 * round(d.size / 32))}"
        )
    target = recipe.masking.target((side, side))
    view = side * recipe.tokens.factor
    given = d.video_list if stream == "video" else d.image_list or d.image_root
    own = given and split == "train"
    folder = Path() if own else synthetic.render()
    if stream == "image":
        root = Path(d.image_root or ".") if own else folder / "images" / split
        if own and d.image_list:
            entries = read_list(Path(d.image_list), root, labelled=False)
        else:
            entries = read_image_folder(root)
        hide = partial(hide_blocks, grid=(side, side), target=target)
        return PretrainImages(
            leave_out_bad(entries, d.checked if own else (), root), size=d.size, short=d.short,
            input_size=view, mask=hide, jitter=d.jitter, seed=recipe.run.seed, timeout=d.timeout,
        )  # fmt: skip
    if own:
        root = Path(d.video_root or ".")
        entries = read_entries(Path(d.video_list), root, labelled=False)
        entries = leave_out_bad(entries, d.checked, root)
    else:
        entries = read_list(folder / f"how_{split}.txt", folder)
    steps = math.ceil(d.frames / recipe.model.patch[0])
    hide = partial(hide_tubes, grid=(steps, side, side), target=target, length=recipe.masking.tube)
    return PretrainClips(
        entries, frames=d.frames, interval=d.interval, size=d.size, short=d.short,
        input_size=view, mask=hide, seed=recipe.run.seed, timeout=d.timeout,
    )  # fmt: skip


def global_batches(recipe: Pretrain) -> dict[str, int]:
    """Give the items of each stream per optimiser step."""
    sizes = {"video": recipe.optim.clips, "image": recipe.optim.images}
    return {stream: sizes[stream] for stream in recipe.streams}


def train(recipe: Pretrain) -> tuple[BEVT, list[dict[str, float]]]:
    """Run a pretraining recipe; return the model and the record, one dict per step."""
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    loop.be_deterministic(recipe.run.deterministic)
    tokenizer = build_tokenizer(recipe)
    recipe = sized_for(recipe, tokenizer)
    model = build_model(recipe)
    report = start_weights(recipe, model)
    if distributed.rank() == 0:
        print(report)
    distributed.once_per_node(synthetic.render, needed=not recipe.data.image_root)
    sources = {
        stream: Source(
            Positions(
                build_items(recipe, stream), seed=recipe.run.seed,
                stream=Stream[stream.upper()], workers=recipe.data.workers,
            ),
            batch,
        )
        for stream, batch in global_batches(recipe).items()
    }  # fmt: skip
    first = sources[recipe.streams[0]].items
    history = loop.fit(
        model, sources, recipe.optim, loop.in_folder(recipe.run, run_folder(recipe)),
        steps=total_steps(recipe.optim, len(first)),
        prepare=lambda batch, step: add_tokens(
            batch, tokenizer, hidden_only=True, fp16=recipe.tokens.fp16),
        config=flatten(recipe) | {"tokens.sha256": naming_digest(tokenizer)},
        rename=released_name, bad_share=recipe.data.bad_share,
    )  # fmt: skip
    return model, history


def score(recipe: Pretrain, model: BEVT, stream: str, count: int = 512) -> TokenScore:
    """Score a model on ``count`` held-out items of the embedded test split."""
    tokenizer = build_tokenizer(recipe)
    recipe = sized_for(recipe, tokenizer)
    return score_tokens(model, tokenizer, stream, build_items(recipe, stream, "test"), count)


def plan(recipe: Pretrain) -> str:
    """Describe a run before its first step: size, steps, tokens, cost.

    Nothing is read but the tokenizer that ``tokens.weights`` names, where it is there already.
    """
    words, given, shipped = recipe.tokens.vocab_size, recipe.tokens.weights, lesson_dvae()
    tokenizer: FrozenTokenizer
    if given and Path(given).exists():
        tokenizer, told = load_tokenizer(given), given
        recipe = sized_for(recipe, tokenizer)
    else:
        # DALL-E's own for its number of words, else one of the shipped one's size
        hidden, blocks = (256, 2) if words == 8192 else (shipped.hidden, shipped.blocks)
        tokenizer = DalleTokenizer(*build(hidden, blocks, words))
        told = f"{given or '--tokens.weights'}, not there yet"
        if not given and words == shipped.tokens.vocab_size:
            told = "the shipped one"
    tokenizer.to("meta")
    with torch.device("meta"):
        model = build_model(recipe)
    items = {s: cost.token_item(recipe, model, tokenizer, s) for s in recipe.streams}
    lines = cost.describe(recipe, model, global_batches(recipe), items, tokenizer)
    lines["tokenizer"] = f"{told}: {recipe.tokens.vocab_size:,} tokens of {recipe.tokens.factor} px"
    lines["starts from"] = recipe.run.init or recipe.default_init or (
        "--run.init, not given yet" if recipe.needs_init else "random weights")  # fmt: skip
    return cost.write(lines)


if __name__ == "__main__":
    run_command(main)
