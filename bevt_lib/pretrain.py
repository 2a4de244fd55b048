"""Pretrain: ``python -m bevt_lib.pretrain PRESET --overrides``, also under torchrun."""

from dataclasses import replace
from pathlib import Path

import torch

from bevt_lib.base import distributed
from bevt_lib.base.config import Pretrain, flatten, run_folder
from bevt_lib.base.seeds import Stream
from bevt_lib.cli import choose, run_command, with_recipe
from bevt_lib.datasets import sources
from bevt_lib.datasets.items import Positions
from bevt_lib.model.bevt import BEVT
from bevt_lib.parts import build_bevt, build_tokenizer, initialise_bevt, sized_for
from bevt_lib.presets import PRETRAIN, lesson_dvae
from bevt_lib.scoring import cost
from bevt_lib.scoring.tokens import TokenScore, score_tokens
from bevt_lib.tokenizers.base import FrozenTokenizer, add_tokens
from bevt_lib.tokenizers.dalle import DalleTokenizer, build
from bevt_lib.tokenizers.load import load_tokenizer
from bevt_lib.training import loop
from bevt_lib.training.optim import total_steps
from bevt_lib.training.task import Source, Task
from bevt_lib.weights.formats import released_name


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


def train(recipe: Pretrain) -> tuple[BEVT, list[dict[str, float]]]:
    """Run a pretraining recipe; return the model and the record, one dict per step."""
    loop.set_up(recipe.run)
    sources.check_sources(recipe)
    tokenizer = build_tokenizer(recipe)
    recipe = sized_for(recipe, tokenizer)
    model = build_bevt(recipe)
    report = initialise_bevt(recipe, model)
    if distributed.rank() == 0:
        print(report)
    sources.render_embedded(recipe)
    items = {stream: sources.pretraining_items(recipe, stream) for stream in recipe.streams}
    sources.print_origins(items)
    streams = {
        stream: Source(Positions(items[stream], seed=recipe.run.seed, workers=recipe.data.workers,
                                 stream=Stream[stream.upper()]), batch)
        for stream, batch in recipe.batches.items()
    }  # fmt: skip
    task = Task(
        model=model, sources=streams, rename=released_name, bad_share=recipe.data.bad_share,
        steps=total_steps(recipe.optim, len(items[recipe.streams[0]])),
        prepare=lambda batch, step: add_tokens(
            batch, tokenizer, hidden_only=True, fp16=recipe.tokens.fp16),
        config=flatten(recipe) | {"tokens.sha256": tokenizer.digest()},
    )  # fmt: skip
    run = replace(recipe.run, folder=run_folder(recipe))
    return model, loop.fit(task, recipe.optim, run)


def score(recipe: Pretrain, model: BEVT, stream: str, count: int = 512) -> TokenScore:
    """Score a model on ``count`` held-out items of the embedded test split."""
    tokenizer = build_tokenizer(recipe)
    recipe = sized_for(recipe, tokenizer)
    items = sources.pretraining_items(recipe, stream, "test")
    return score_tokens(model, tokenizer, stream, items, count)


def plan(recipe: Pretrain) -> str:
    """Describe a run before its first step: size, steps, tokens, cost.

    Nothing is read but what is there already of the tokenizer that ``tokens.weights`` names and of
    the recipe's own lists.
    """
    recipe, data = sources.plan_sources(recipe)
    vocab, given, shipped = recipe.tokens.vocab_size, recipe.tokens.weights, lesson_dvae()
    tokenizer: FrozenTokenizer
    if given and Path(given).exists():
        tokenizer, source = load_tokenizer(given), given
        recipe = sized_for(recipe, tokenizer)
    else:
        # DALL-E's own for its vocabulary, else one of the shipped one's size
        hidden, blocks = (256, 2) if vocab == 8192 else (shipped.hidden, shipped.blocks)
        tokenizer = DalleTokenizer(*build(hidden, blocks, vocab))
        source = f"{given or '--tokens.weights'}, not there yet"
        if not given and vocab == shipped.tokens.vocab_size:
            source = "the shipped one"
    tokenizer.to("meta")
    with torch.device("meta"):
        model = build_bevt(recipe)
    items = {s: cost.token_item(recipe, model, tokenizer, s) for s in recipe.streams}
    lines = cost.describe(recipe, model, items, tokenizer)
    lines["tokenizer"] = (
        f"{source}: {recipe.tokens.vocab_size:,} tokens of {recipe.tokens.factor} px"
    )
    lines["starts from"] = recipe.run.init or recipe.default_init or (
        "--run.init, not given yet" if recipe.needs_init else "random weights")  # fmt: skip
    return cost.write(lines | data)


if __name__ == "__main__":
    run_command(main)
