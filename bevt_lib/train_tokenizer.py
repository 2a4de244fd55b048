"""Train a tokenizer: ``python -m bevt_lib.train_tokenizer PRESET --overrides``, also torchrun."""

from pathlib import Path

import numpy as np
import torch

from bevt_lib import dist, engine, synthetic
from bevt_lib.config import TrainTokenizer, choose, flatten, open_door
from bevt_lib.datasets import Entry, Pictures, Positions, read_image_folder
from bevt_lib.dvae import DVAE, anneal
from bevt_lib.engine import Batch, Source
from bevt_lib.optim import cycle_of, total_steps
from bevt_lib.presets import TRAIN_TOKENIZER
from bevt_lib.seeds import Purpose, Stream, seeded_globals, torch_generator
from bevt_lib.tokenizer import save_tokenizer, to_unit
from bevt_lib.video import Video

STRIDE = 16  # pixels of a picture per id: BEVT's grid
FILM_STEP = 8  # every eighth film frame is a training picture
PHOTO_REPEATS = 6  # photos are few beside the stills


def main(arguments: list[str]) -> None:
    """Read the command line and train."""
    recipe = choose(TRAIN_TOKENIZER, arguments, "train_tokenizer")
    with dist.world():
        model, history = train(recipe)
        if dist.rank() == 0:
            path = Path(run_folder(recipe)) / "tokenizer.safetensors"
            save_tokenizer(model.encoder, model.decoder, path)
            last = history[-1]
            print(f"step {last['step'] + 1}: loss {last['loss']:.3f}; tokenizer in {path}")


def run_folder(recipe: TrainTokenizer) -> str:
    """Give the run's folder: ``run.folder`` or runs/<preset>."""
    return recipe.run.folder or f"runs/{recipe.name}"


def training_entries() -> list[Entry]:
    """List the training pictures: stills, training-split photos, film frames (label = frame)."""
    folder = synthetic.render()
    photos = [Entry(path, 0) for path in synthetic.photo_splits()["train"]] * PHOTO_REPEATS
    film = [
        Entry(path, frame)
        for path in sorted((synthetic.data_folder() / "film").glob("*.mp4"))
        for frame in range(0, len(Video(path)), FILM_STEP)
    ]
    return read_image_folder(folder / "images" / "train") + photos + film


def build_model(recipe: TrainTokenizer) -> DVAE:
    """Build the dVAE with weights drawn from the run's seed."""
    side = recipe.data.size // STRIDE
    with seeded_globals(recipe.run.seed, Purpose.WEIGHTS):
        return DVAE(recipe.hidden, recipe.blocks, recipe.tokens.vocab_size, (side, side))


def train(recipe: TrainTokenizer) -> tuple[DVAE, list[dict[str, float]]]:
    """Run a tokenizer recipe; return the model and the record, one dict per step."""
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    dist.first_alone(synthetic.render)
    d = recipe.data
    pictures = Pictures(
        training_entries(), size=d.size, short=d.short,
        view_size=d.size // STRIDE * recipe.tokens.factor, seed=recipe.run.seed,
    )  # fmt: skip
    items = Positions(pictures, seed=recipe.run.seed, stream=Stream.IMAGE, workers=d.workers)
    steps = total_steps(recipe.optim, len(items))

    def prepare(batch: Batch, step: int) -> Batch:
        part = batch["picture"]
        return {"picture": {
            "pixels": to_unit(part["view"]),
            "temperature": anneal(step, recipe.optim.steps, *recipe.temperature),
            "kl_weight": anneal(step, recipe.optim.steps, *recipe.kl_weight),
            "noise_scale": float(cycle_of(recipe.optim, step)[0] == 0),
            "decoder_only": cycle_of(recipe.optim, step)[0] == 2,
            "balance_weight": recipe.balance_weight,
            "position": part["position"],
        }}  # fmt: skip

    model = build_model(recipe)
    sample = np.stack([pictures.sample(0, i)["view"] for i in range(0, len(pictures), 8)])
    generator = torch_generator(recipe.run.seed, Purpose.WEIGHTS)
    model.spread_codes(to_unit(torch.from_numpy(sample)), generator)
    history = engine.fit(
        model, {"picture": Source(items, recipe.optim.images)}, recipe.optim,
        engine.in_folder(recipe.run, run_folder(recipe)),
        steps=steps, prepare=prepare, config=flatten(recipe),
    )  # fmt: skip
    return model, history


if __name__ == "__main__":
    open_door(main)
