"""Train a tokenizer: ``python -m bevt_lib.train_tokenizer PRESET --overrides``, also torchrun.

RUN/tokenizer.safetensors      the result, for --tokens.weights
RUN/strips/step_00000500.png   held-out pictures, below them what they become
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from bevt_lib.base import distributed
from bevt_lib.base.config import Optim, TrainPeco, TrainTokenizer, flatten
from bevt_lib.base.seeds import Purpose, Stream, seeded_globals, torch_generator
from bevt_lib.base.trainable import Batch
from bevt_lib.cli import choose, print_plan, run_command
from bevt_lib.datasets import sources
from bevt_lib.datasets.items import Pictures, Positions
from bevt_lib.datasets.lists import Entry
from bevt_lib.model.bevt import STRIDE
from bevt_lib.presets import TRAIN_TOKENIZER
from bevt_lib.scoring import cost
from bevt_lib.tokenizers.base import FrozenTokenizer, TrainableTokenizer, psnr, to_unit, usage
from bevt_lib.tokenizers.dalle import build
from bevt_lib.tokenizers.dvae import DVAE
from bevt_lib.tokenizers.peco import Peco, PecoShape
from bevt_lib.tokenizers.perceptual import PerceptualDistance
from bevt_lib.training import loop
from bevt_lib.training.optim import cycle_of, total_steps
from bevt_lib.training.task import Source, Task

HELD_OUT = 64  # held-out pictures that are scored while training
SHOWN = 8  # of them in a strip

Recipe = TrainTokenizer | TrainPeco


def main(arguments: list[str]) -> None:
    """Read the command line, then plan or train."""
    recipe = choose(TRAIN_TOKENIZER, arguments, "train_tokenizer")
    if recipe.run.dry_run:
        return print_plan(plan(recipe), recipe)
    with distributed.world():
        model, history = train(recipe)
        if distributed.rank() == 0:
            path = recipe.folder / "tokenizer.safetensors"
            model.tokenizer().save(path)
            last = history[-1]
            print(f"step {last['step'] + 1}: loss {last['loss']:.3f}; tokenizer in {path}")


def split_entries(recipe: Recipe) -> tuple[list[Entry], list[Entry], str]:
    """List (training pictures, HELD_OUT held-out ones), and say where they come from.

    Of one's own pictures every n-th is held out; of the embedded data, validation stills.
    """
    entries, origin = sources.list_entries(recipe, "image")
    if not sources.place_of(recipe, "image").own:
        stills, _ = sources.list_entries(recipe, "image", "val")
        return entries, stills[:: len(stills) // HELD_OUT], origin
    held = set(range(0, len(entries), max(2, len(entries) // HELD_OUT)))
    kept = [entry for i, entry in enumerate(entries) if i not in held]
    return kept, [entries[i] for i in sorted(held)], f"{origin}; {len(held)} of them held out"


def input_size(recipe: Recipe) -> int:
    """Give the side of the tokenizer's input, pixels."""
    return recipe.view or recipe.data.size // STRIDE * recipe.tokens.factor


def pictures_of(recipe: Recipe, entries: Sequence[Entry], origin: str = "") -> Pictures:
    """Make the data set that gives pictures as the tokenizer's input."""
    return Pictures(entries, recipe.data.clip_spec(), input_size=input_size(recipe),
                    **sources.reading(recipe, origin))  # fmt: skip


def stack(pictures: Pictures, every: int = 1) -> Tensor:
    """Read every so many of the pictures: uint8 (N, v, v, 3)."""
    samples = [pictures.sample(0, i) for i in range(0, len(pictures), every)]
    return torch.from_numpy(np.stack([sample["tokenizer_input"] for sample in samples]))


def build_dvae(recipe: TrainTokenizer, networks: bool) -> DVAE:
    """Build DALL-E's dVAE. A length of 0 in the recipe's schedule is four fifths of the steps."""
    side, most = input_size(recipe) // recipe.tokens.factor, 0.8 * recipe.optim.steps
    schedule = {
        "temperature": (*recipe.temperature, recipe.temperature_steps or most),
        "kl_weight": (*recipe.kl_weight, recipe.kl_steps or most),
        "balance_weight": (recipe.balance_weight, recipe.balance_weight, 0),
    }
    parts = build(recipe.hidden, recipe.blocks, recipe.tokens.vocab_size)
    return DVAE(*parts, (side, side), schedule, recipe.quick_start)


def build_peco(recipe: TrainPeco, networks: bool) -> Peco:
    """Build PeCo's VQ-VAE, with ``networks`` also the perceptual one on this process's device."""
    r, tokens = recipe, recipe.tokens
    shape = PecoShape(r.hidden, r.blocks, r.code_dim, tokens.factor, tokens.vocab_size)
    model = Peco(shape, perceptual_weight=r.perceptual_weight)
    model.notes = {"perceptual": f"{r.perceptual}, weight {r.perceptual_weight}"}
    if networks and r.perceptual != "none":
        network = r.perceptual, r.perceptual_weights, r.perceptual_levels, r.perceptual_side
        model.perceptual = PerceptualDistance(*network).to(distributed.device())
    return model


BUILD: dict[type, Callable[..., TrainableTokenizer]] = {
    TrainTokenizer: build_dvae, TrainPeco: build_peco}  # fmt: skip


def build_model(recipe: Recipe, networks: bool = False) -> TrainableTokenizer:
    """Build the recipe's tokenizer in training, with weights drawn from the run's seed.

    ``networks``: load the frozen networks of its loss as well.
    """
    with seeded_globals(recipe.run.seed, Purpose.WEIGHTS):
        return BUILD[type(recipe)](recipe, networks)


def prepare_batch(model: TrainableTokenizer, optim: Optim, batch: Batch, step: int) -> Batch:
    """Turn pictures into floats, and add what the model's schedule says at this step."""
    part = batch["picture"]
    pixels = to_unit(part["tokenizer_input"])
    schedule = model.schedule_at(step, cycle_of(optim, step)[0])
    return {"picture": {"pixels": pixels, "position": part["position"], "schedule": schedule}}


def score_and_draw(tokenizer: FrozenTokenizer, pictures: Tensor, strip: Path) -> dict[str, float]:
    """Score a tokenizer on held-out pictures, uint8 (N, v, v, 3), and write a strip of some."""
    ids = tokenizer.encode(pictures)
    painted = tokenizer.decode(ids)
    used, perplexity = usage(ids, tokenizer.vocab_size)
    if distributed.rank() == 0:
        rows = [torch.cat(list(part[:: max(1, len(part) // SHOWN)][:SHOWN].cpu()), dim=1)
                for part in (pictures, painted)]  # fmt: skip
        picture = cv2.cvtColor(torch.cat(rows).numpy(), cv2.COLOR_RGB2BGR)
        strip.parent.mkdir(parents=True, exist_ok=True)
        cv2.imencode(".png", picture)[1].tofile(strip)
    return {"psnr": psnr(pictures, painted), "usage": used, "perplexity": perplexity}


def train(recipe: Recipe) -> tuple[TrainableTokenizer, list[dict[str, float]]]:
    """Run a tokenizer recipe; return the model and the record, one dict per step."""
    loop.set_up(recipe.run)
    sources.check_sources(recipe)
    sources.render_embedded(recipe)
    seed, folder = recipe.run.seed, recipe.folder
    entries, held, origin = split_entries(recipe)
    pictures = pictures_of(recipe, entries, origin)
    sources.print_origins({"image": pictures})
    items = Positions(pictures, seed=seed, stream=Stream.IMAGE, workers=recipe.data.workers)
    model = build_model(recipe, networks=True)
    if model.start_pictures:
        sample = stack(pictures, max(8, len(pictures) // model.start_pictures))
        model.start_codebook(to_unit(sample), torch_generator(seed, Purpose.WEIGHTS))
    watched = stack(pictures_of(recipe, held)).to(distributed.device())
    task = Task(
        model=model, sources={"picture": Source(items, recipe.optim.images)},
        steps=total_steps(recipe.optim, len(items)), validate_every=recipe.watch_every,
        prepare=lambda batch, step: prepare_batch(model, recipe.optim, batch, step),
        after_step=lambda step: model.update_codes(torch_generator(seed, Purpose.WEIGHTS, 1, step)),
        config=flatten(recipe), bad_share=recipe.data.bad_share,
        validate=lambda done: score_and_draw(
            model.tokenizer(), watched, folder / "strips" / f"step_{done:08d}.png"),
    )  # fmt: skip
    return model, loop.fit(task, recipe.optim, replace(recipe.run, folder=str(folder)))


def plan(recipe: Recipe) -> str:
    """Describe a run before its first step: size, steps, cost; only your own list is read."""
    recipe, data = sources.plan_sources(recipe)
    side = input_size(recipe)
    grid = side // recipe.tokens.factor
    with torch.device("meta"):
        model = build_model(recipe)
    encoding = cost.count(model.encoder, cost.empty(1, 3, side, side))
    painting = cost.count(model.decoder, cost.empty(1, model.decoder_channels, grid, grid))
    processes = recipe.run.processes or distributed.world_size()
    split = loop.split_batch({"picture": recipe.optim.images}, processes, recipe.run.micro_batch)
    expected = recipe.data.expected_items
    return cost.write({
        "preset": recipe.name,
        "parameters": f"{cost.parameters(model):,} trained",
        "tokenizer_input": f"{side}x{side} px, {grid}x{grid} ids of {recipe.tokens.vocab_size:,}",
        "global batch": f"{recipe.optim.images} pictures",
        "cut into": str(split),
        "steps": f"{total_steps(recipe.optim, expected):,}"
                 + (f" ({expected:,} pictures)" if expected else ""),
        "one picture": f"multiply-adds forward: {cost.amount(encoding.total + painting.total)}",
        **model.notes, **data,
    })  # fmt: skip


if __name__ == "__main__":
    run_command(main)
