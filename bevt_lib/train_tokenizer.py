"""Train a tokenizer: ``python -m bevt_lib.train_tokenizer PRESET --overrides``, also torchrun.

RUN/tokenizer.safetensors      the result, for --tokens.weights
RUN/strips/step_00000500.png   held-out pictures, below them what they become
"""

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bevt_lib import cli, presets
from bevt_lib.base import distributed
from bevt_lib.base.config import Optim, TrainPeco, TrainTokenizer, flatten
from bevt_lib.base.seeds import Purpose, Stream, seeded_globals, torch_generator
from bevt_lib.base.trainable import Batch, collate
from bevt_lib.datasets import items, lists, sources
from bevt_lib.model.bevt import STRIDE
from bevt_lib.scoring import cost
from bevt_lib.tokenizers import base, dalle, dvae, peco, perceptual
from bevt_lib.training import loop, optim, task

HELD_OUT = 64  # held-out pictures that are scored while training
SHOWN = 8  # of them in a strip

Recipe = TrainTokenizer | TrainPeco
Numbers = dict[str, float]  # by their names in the record


def main(arguments: list[str]) -> None:
    """Read the command line, then plan or train."""
    recipe = cli.choose(presets.TRAIN_TOKENIZER, arguments, "train_tokenizer")
    if recipe.run.dry_run:
        return cli.print_plan(plan(recipe), recipe)
    with distributed.world():
        model, history = train(recipe)
        if distributed.rank() == 0:
            path = recipe.folder / "tokenizer.safetensors"
            model.tokenizer().save(path)
            print(f"step {len(history)}: loss {history[-1]['loss']:.3f}; tokenizer in {path}")


def split_entries(recipe: Recipe) -> tuple[list[lists.Entry], list[lists.Entry], str]:
    """List (training pictures, HELD_OUT held-out ones), and say where they come from.

    Of your own pictures every n-th is held out; of the embedded data, validation stills.
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


def pictures_of(recipe: Recipe, entries: list[lists.Entry], origin: str = "") -> items.Pictures:
    """Make the data set that gives pictures as the tokenizer's input."""
    settings = sources.reading(recipe, origin) | {"input_size": input_size(recipe)}
    return items.Pictures(entries, recipe.data.clip_spec(), **settings)


def stack(pictures: items.Pictures, every: int = 1) -> Tensor:
    """Read every so many of the pictures: uint8 (N, v, v, 3)."""
    samples = [pictures.sample(0, i) for i in range(0, len(pictures), every)]
    return collate(samples)["tokenizer_input"]


def build_model(recipe: Recipe, networks: bool = False) -> base.TrainableTokenizer:
    """Build the recipe's tokenizer in training, with weights drawn from the run's seed.

    ``networks``: load PeCo's perceptual network as well. A length of 0 in a dVAE's schedule is four
    fifths of the steps.
    """
    r, tokens = recipe, recipe.tokens
    with seeded_globals(r.run.seed, Purpose.WEIGHTS):
        if isinstance(r, TrainPeco):
            shape = peco.PecoShape(r.hidden, r.blocks, r.code_dim, tokens.factor, tokens.vocab_size)
            model = peco.Peco(shape, weight=r.perceptual_weight)
            if networks and r.perceptual != "none":
                network = r.perceptual, r.perceptual_weights, r.perceptual_levels, r.perceptual_side
                model.perceptual = perceptual.PerceptualDistance(*network)
            return model
        side, most = input_size(r) // tokens.factor, 0.8 * r.optim.steps
        schedule = {
            "temperature": (*r.temperature, r.temperature_steps or most),
            "kl_weight": (*r.kl_weight, r.kl_steps or most),
            "balance_weight": (r.balance_weight, r.balance_weight, 0),
        }
        parts = dalle.build(r.hidden, r.blocks, tokens.vocab_size)
        return dvae.DVAE(*parts, (side, side), schedule, r.quick_start)


def prepare_batch(model: base.TrainableTokenizer, rate: Optim, batch: Batch, step: int) -> Batch:
    """Turn pictures into floats, and add what the model's schedule says at this step."""
    part, schedule = batch["picture"], model.schedule_at(step, optim.cycle_of(rate, step)[0])
    pixels = base.to_unit(part["tokenizer_input"])
    return {"picture": {"pixels": pixels, "position": part["position"], "schedule": schedule}}


def score_and_draw(tokenizer: base.FrozenTokenizer, pictures: Tensor, strip: Path) -> Numbers:
    """Score a tokenizer on held-out pictures, uint8 (N, v, v, 3), and write a strip of some."""
    ids = tokenizer.encode(pictures)
    painted = tokenizer.decode(ids)
    used, perplexity = base.usage(ids, tokenizer.vocab_size)
    if distributed.rank() == 0:
        every = max(1, len(pictures) // SHOWN)
        rows = [torch.cat([*part[::every][:SHOWN]], dim=1) for part in (pictures, painted)]
        strip.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.cat(rows).cpu().numpy()).save(strip)
    return {"psnr": base.psnr(pictures, painted), "usage": used, "perplexity": perplexity}


def train(recipe: Recipe) -> tuple[base.TrainableTokenizer, list[Numbers]]:
    """Run a tokenizer recipe; return the model and the record, one dict per step."""
    loop.set_up(recipe.run)
    sources.check_sources(recipe)
    sources.render_embedded(recipe)
    seed, folder = recipe.run.seed, recipe.folder
    # Data, without those held out.
    entries, held, origin = split_entries(recipe)
    pictures = pictures_of(recipe, entries, origin)
    sources.print_origins({"image": pictures})
    order = items.Positions(pictures, seed=seed, stream=Stream.IMAGE, workers=recipe.data.workers)
    # The model, its codebook started from some of the pictures.
    model = build_model(recipe, networks=True)
    if model.start_pictures:
        sample = stack(pictures, max(8, len(pictures) // model.start_pictures))
        model.start_codebook(base.to_unit(sample), torch_generator(seed, Purpose.WEIGHTS))
    # Training, with a look at the held-out pictures now and then.
    watched = stack(pictures_of(recipe, held)).to(distributed.device())
    job = task.Task(
        model=model, sources={"picture": task.Source(order, recipe.optim.images)},
        steps=optim.total_steps(recipe.optim, len(order)), validate_every=recipe.watch_every,
        prepare=lambda batch, step: prepare_batch(model, recipe.optim, batch, step),
        after_step=lambda step: model.update_codes(torch_generator(seed, Purpose.WEIGHTS, 1, step)),
        config=flatten(recipe), bad_share=recipe.data.bad_share,
        validate=lambda done: score_and_draw(
            model.tokenizer(), watched, folder / "strips" / f"step_{done:08d}.png"),
    )  # fmt: skip
    return model, loop.fit(job, recipe.optim, replace(recipe.run, folder=str(folder)))


def plan(recipe: Recipe) -> str:
    """Describe a run before its first step: size, steps, cost; only your own list is read."""
    recipe, data = sources.plan_sources(recipe)
    side = input_size(recipe)
    grid = side // recipe.tokens.factor
    with torch.device("meta"):
        model = build_model(recipe)
    work = cost.count(model.encoder, cost.empty(1, 3, side, side)).total
    work += cost.count(model.decoder, cost.empty(1, model.decoder_channels, grid, grid)).total
    processes = recipe.run.processes or distributed.world_size()
    split = loop.split_batch({"picture": recipe.optim.images}, processes, recipe.run.micro_batch)
    if isinstance(recipe, TrainPeco):
        data = {"perceptual": f"{recipe.perceptual}, weight {recipe.perceptual_weight}", **data}
    expected = recipe.data.expected_items
    epoch = f" ({expected:,} pictures)" if expected else ""
    return cost.write({
        "preset": recipe.name,
        "parameters": f"{cost.parameters(model):,} trained",
        "tokenizer input": f"{side}x{side} px, {grid}x{grid} ids of {recipe.tokens.vocab_size:,}",
        "global batch": f"{recipe.optim.images} pictures",
        "cut into": str(split),
        "steps": f"{optim.total_steps(recipe.optim, expected):,}{epoch}",
        "one picture": f"multiply-adds forward: {cost.amount(work)}",
        **data,
    })  # fmt: skip


if __name__ == "__main__":
    cli.run_command(main)
