"""Pretrain: ``python -m bevt_lib.pretrain PRESET --overrides``, also under torchrun."""

from dataclasses import replace
from pathlib import Path

from bevt_lib import cli, parts, presets
from bevt_lib.base import distributed, seeds
from bevt_lib.base.config import Pretrain, flatten
from bevt_lib.datasets import sources
from bevt_lib.datasets.items import Positions
from bevt_lib.model.bevt import BEVT
from bevt_lib.scoring import cost, tokens
from bevt_lib.tokenizers import dalle, load
from bevt_lib.tokenizers.base import FrozenTokenizer, add_tokens
from bevt_lib.training import loop, optim
from bevt_lib.training.task import Source, Task
from bevt_lib.weights.formats import released_name


def main(arguments: list[str]) -> None:
    """Read the command line, then plan or train."""
    recipe = cli.choose(presets.PRETRAIN, arguments, "pretrain")
    if recipe.run.dry_run:
        return cli.print_plan(plan(recipe), recipe)
    with distributed.world():
        model, history = train(recipe)
        if distributed.rank() == 0:
            model.save_pretrained(recipe.folder / "model")
            steps, loss = len(history), history[-1]["loss"]
            print(f"step {steps}: loss {loss:.3f}; run in {recipe.folder}")


def train(recipe: Pretrain) -> tuple[BEVT, list[dict[str, float]]]:
    """Run a pretraining recipe; return the model and the record, one dict per step."""
    loop.set_up(recipe.run)
    sources.check_sources(recipe)
    tokenizer = parts.build_tokenizer(recipe)
    recipe = parts.sized_for(recipe, tokenizer)
    model = parts.build_bevt(recipe)
    report = parts.initialise_bevt(recipe, model)
    distributed.say(report)
    sources.render_embedded(recipe)
    items = {stream: sources.pretraining_items(recipe, stream) for stream in recipe.streams}
    sources.print_origins(items)
    streams = {
        stream: Source(Positions(items[stream], seed=recipe.run.seed, workers=recipe.data.workers,
                                 stream=seeds.Stream[stream.upper()]), batch)
        for stream, batch in recipe.batches.items()
    }  # fmt: skip
    task = Task(
        model=model, sources=streams, rename=released_name, bad_share=recipe.data.bad_share,
        steps=optim.total_steps(recipe.optim, len(items[recipe.streams[0]])),
        prepare=lambda batch, step: add_tokens(
            batch, tokenizer, hidden_only=True, fp16=recipe.tokens.fp16),
        config=flatten(recipe) | {"tokens.sha256": tokenizer.digest()})  # fmt: skip
    return model, loop.fit(task, recipe.optim, replace(recipe.run, folder=str(recipe.folder)))


def score(recipe: Pretrain, model: BEVT, stream: str, count: int = 512) -> tokens.TokenScore:
    """Score a model on ``count`` held-out items of the embedded test split."""
    tokenizer = parts.build_tokenizer(recipe)
    items = sources.pretraining_items(parts.sized_for(recipe, tokenizer), stream, "test")
    return tokens.score_tokens(model, tokenizer, stream, items, count)


def plan(recipe: Pretrain) -> str:
    """Describe a run before its first step: size, steps, tokens, cost.

    Nothing is read but what is there already of the tokenizer that ``tokens.weights`` names and of
    the recipe's own lists.
    """
    recipe, data = sources.plan_sources(recipe)
    vocab, given, shipped = recipe.tokens.vocab_size, recipe.tokens.weights, presets.lesson_dvae()
    tokenizer: FrozenTokenizer
    if given and Path(given).exists():
        tokenizer, source = load.load_tokenizer(given), given
        recipe = parts.sized_for(recipe, tokenizer)
    else:
        # DALL-E's own for its vocabulary, else one of the shipped one's size
        hidden, blocks = (256, 2) if vocab == 8192 else (shipped.hidden, shipped.blocks)
        tokenizer = dalle.DalleTokenizer(*dalle.build(hidden, blocks, vocab))
        known = not given and vocab == shipped.tokens.vocab_size
        source = "the shipped one" if known else f"{given or '--tokens.weights'}, not there yet"
    model, items = parts.measure_items(recipe, tokenizer)
    size, start = recipe.tokens, "random weights"
    if recipe.needs_init:
        start = "--run.init, not given yet"
    return cost.write({
        **cost.describe(recipe, model, items, tokenizer),
        "tokenizer": f"{source}: {size.vocab_size:,} tokens of {size.factor} px",
        "starts from": recipe.run.init or recipe.default_init or start,
        **data,
    })  # fmt: skip


if __name__ == "__main__":
    cli.run_command(main)
