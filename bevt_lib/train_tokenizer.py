"""Train a tokenizer: ``python -m bevt_lib.train_tokenizer PRESET --overrides``, also torchrun.

RUN/tokenizer.safetensors      the result, for --tokens.weights
RUN/strips/step_00000500.png   held-out pictures, below them what they become
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from bevt_lib.base import distributed
from bevt_lib.base.config import TrainPeco, TrainTokenizer, flatten, run_folder
from bevt_lib.base.seeds import Purpose, Stream, seeded_globals, torch_generator
from bevt_lib.cli import choose, run_command
from bevt_lib.datasets import sources
from bevt_lib.datasets.items import Pictures, Positions
from bevt_lib.datasets.lists import Entry
from bevt_lib.presets import TRAIN_TOKENIZER
from bevt_lib.scoring import cost
from bevt_lib.tokenizers.base import psnr, to_unit, usage
from bevt_lib.tokenizers.dalle import save_tokenizer
from bevt_lib.tokenizers.dvae import DVAE, anneal
from bevt_lib.tokenizers.load import FrozenTokenizer
from bevt_lib.tokenizers.peco import Peco, PecoTokenizer, save_peco
from bevt_lib.tokenizers.perceptual import PerceptualDistance
from bevt_lib.training import loop
from bevt_lib.training.loop import Batch, Source
from bevt_lib.training.optim import cycle_of, total_steps

STRIDE = 16  # pixels of a picture per id: BEVT's grid
HELD_OUT = 64  # held-out pictures looked at while training
SHOWN = 8  # of them in a strip
START_PICTURES = 1024  # from which words and codes start, at most

Recipe = TrainTokenizer | TrainPeco


def main(arguments: list[str]) -> None:
    """Read the command line, then plan or train."""
    recipe = choose(TRAIN_TOKENIZER, arguments, "train_tokenizer")
    if recipe.run.dry_run:
        print(plan(recipe))
        return
    with distributed.world():
        model, history = train(recipe)
        if distributed.rank() == 0:
            path = Path(run_folder(recipe)) / "tokenizer.safetensors"
            save(model.tokenizer(), path)
            last = history[-1]
            print(f"step {last['step'] + 1}: loss {last['loss']:.3f}; tokenizer in {path}")


def save(tokenizer: FrozenTokenizer, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a tokenizer of either kind to one safetensors file."""
    if isinstance(tokenizer, PecoTokenizer):
        save_peco(tokenizer, path, dtype)
    else:
        save_tokenizer(tokenizer.encoder, tokenizer.decoder, path, dtype)


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


def pictures_of(recipe: Recipe, entries: Sequence[Entry], origin: str = "") -> Pictures:
    """Make the data set that gives the tokenizer's inputs."""
    d = recipe.data
    side = recipe.view or d.size // STRIDE * recipe.tokens.factor
    return Pictures(entries, d.clip_spec(), input_size=side, **sources.reading(recipe, origin))


def build_model(recipe: Recipe) -> DVAE | Peco:
    """Build the dVAE or VQ-VAE with weights drawn from the run's seed, without perceptual loss."""
    tokens = recipe.tokens
    side = (recipe.view or recipe.data.size // STRIDE * tokens.factor) // tokens.factor
    with seeded_globals(recipe.run.seed, Purpose.WEIGHTS):
        if isinstance(recipe, TrainPeco):
            return Peco(recipe.hidden, recipe.blocks, recipe.code_dim, tokens.factor,
                        tokens.vocab_size, perceptual_weight=recipe.perceptual_weight)  # fmt: skip
        return DVAE(recipe.hidden, recipe.blocks, tokens.vocab_size, (side, side),
                    full_branches=recipe.quick_start)  # fmt: skip


def perceptual_distance(recipe: TrainPeco) -> PerceptualDistance | None:
    """Load the recipe's perceptual network, if it names one, on this process's device."""
    if recipe.perceptual == "none":
        return None
    return PerceptualDistance(
        recipe.perceptual, recipe.perceptual_weights, recipe.perceptual_levels,
        recipe.perceptual_side,
    ).to(distributed.device())  # fmt: skip


def prepare_batch(recipe: Recipe, batch: Batch, step: int) -> Batch:
    """Turn views into floats, and add what the dVAE's schedules say at this step."""
    part = batch["picture"]
    ready = {"pixels": to_unit(part["tokenizer_input"]), "position": part["position"]}
    if isinstance(recipe, TrainTokenizer):
        cycle = cycle_of(recipe.optim, step)[0]
        most = 0.8 * recipe.optim.steps
        ready |= {
            "temperature": anneal(step, recipe.temperature_steps or most, *recipe.temperature),
            "kl_weight": anneal(step, recipe.kl_steps or most, *recipe.kl_weight),
            "noise_scale": float(cycle == 0),
            "decoder_only": cycle == 2,
            "balance_weight": recipe.balance_weight,
        }
    return {"picture": ready}


def score_and_draw(tokenizer: FrozenTokenizer, views: Tensor, strip: Path) -> dict[str, float]:
    """Score a tokenizer on held-out views, uint8 (N, v, v, 3), and write a strip of some."""
    ids = tokenizer.encode(views)
    painted = tokenizer.decode(ids)
    used, perplexity = usage(ids, tokenizer.vocab_size)
    if distributed.rank() == 0:
        rows = [torch.cat(list(part[:: max(1, len(part) // SHOWN)][:SHOWN].cpu()), dim=1)
                for part in (views, painted)]  # fmt: skip
        picture = cv2.cvtColor(torch.cat(rows).numpy(), cv2.COLOR_RGB2BGR)
        strip.parent.mkdir(parents=True, exist_ok=True)
        cv2.imencode(".png", picture)[1].tofile(strip)
    return {"psnr": psnr(views, painted), "usage": used, "perplexity": perplexity}


def train(recipe: Recipe) -> tuple[DVAE | Peco, list[dict[str, float]]]:
    """Run a tokenizer recipe; return the model and the record, one dict per step."""
    sources.check_sources(recipe)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    loop.be_deterministic(recipe.run.deterministic)
    sources.render_embedded(recipe)
    d, seed, folder = recipe.data, recipe.run.seed, Path(run_folder(recipe))
    entries, held, origin = split_entries(recipe)
    pictures = pictures_of(recipe, entries, origin)
    sources.print_origins({"image": pictures})
    items = Positions(pictures, seed=seed, stream=Stream.IMAGE, workers=d.workers)
    steps = total_steps(recipe.optim, len(items))
    model = build_model(recipe)
    if isinstance(model, Peco) and isinstance(recipe, TrainPeco):
        model.perceptual = perceptual_distance(recipe)
    start_words(recipe, model, pictures)
    watched = pictures_of(recipe, held)
    views = torch.from_numpy(
        np.stack([watched.sample(0, i)["tokenizer_input"] for i in range(len(held))])
    )
    views = views.to(distributed.device())

    def after_step(step: int) -> Mapping[str, float]:
        if isinstance(model, Peco):
            return model.update_codes(torch_generator(seed, Purpose.WEIGHTS, 1, step))
        return {}

    def validate(done: int) -> dict[str, float]:
        return score_and_draw(model.tokenizer(), views, folder / "strips" / f"step_{done:08d}.png")

    history = loop.fit(
        model, {"picture": Source(items, recipe.optim.images)}, recipe.optim,
        loop.in_folder(recipe.run, str(folder)), steps=steps,
        prepare=lambda batch, step: prepare_batch(recipe, batch, step),
        after_step=after_step, config=flatten(recipe), bad_share=d.bad_share,
        validate=validate, validate_every=recipe.watch_every,
    )  # fmt: skip
    return model, history


def start_words(recipe: Recipe, model: DVAE | Peco, pictures: Pictures) -> None:
    """Start words or codes from what the untrained encoder makes of some training pictures."""
    if isinstance(recipe, TrainTokenizer) and not recipe.quick_start:
        return
    every = max(8, len(pictures) // START_PICTURES)
    sample = np.stack(
        [pictures.sample(0, i)["tokenizer_input"] for i in range(0, len(pictures), every)]
    )
    generator = torch_generator(recipe.run.seed, Purpose.WEIGHTS)
    start = model.start_codes if isinstance(model, Peco) else model.spread_codes
    start(to_unit(torch.from_numpy(sample)), generator)


def plan(recipe: Recipe) -> str:
    """Describe a run before its first step: size, steps, cost; only one's own list is read."""
    recipe, data = sources.plan_sources(recipe)
    side = recipe.view or recipe.data.size // STRIDE * recipe.tokens.factor
    with torch.device("meta"):
        model = build_model(recipe)
    grid = side // recipe.tokens.factor
    picture = cost.empty(1, 3, side, side)
    painting = cost.empty(1, getattr(recipe, "code_dim", recipe.tokens.vocab_size), grid, grid)
    work = cost.count(model.encoder, picture).total + cost.count(model.decoder, painting).total
    batches = {"picture": recipe.optim.images}
    processes = recipe.run.processes or distributed.world_size()
    expected = recipe.data.expected_items
    lines = {
        "preset": recipe.name,
        "parameters": f"{cost.parameters(model):,} trained",
        "tokenizer_input": f"{side}x{side} px, {grid}x{grid} ids of {recipe.tokens.vocab_size:,}",
        "global batch": f"{recipe.optim.images} pictures",
        "cut into": str(loop.split_batch(batches, processes, recipe.run.micro_batch)),
        "steps": f"{total_steps(recipe.optim, expected):,}"
                 + (f" ({expected:,} pictures)" if expected else ""),
        "one picture": f"multiply-adds forward: {cost.amount(work)}",
    }  # fmt: skip
    if isinstance(recipe, TrainPeco):
        lines["perceptual"] = f"{recipe.perceptual}, weight {recipe.perceptual_weight}"
    return cost.write(lines | data)


if __name__ == "__main__":
    run_command(main)
