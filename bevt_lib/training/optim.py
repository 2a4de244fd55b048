"""Parameter groups, learning rates as functions of the step, and the EMA of the weights."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from bevt_lib.base.config import Optim
from bevt_lib.base.trainable import Trainable

Rule = tuple[str, float, float]


def factors(name: str, rules: Iterable[Rule]) -> tuple[float, float]:
    """Find (lr factor, decay factor) of a parameter: the longest rule contained in its name wins.

    Ties go to the alphabetically first; no hit is (1, 1). Source: mmcv's optimizer constructor,
    which the released recipe relies on.
    """
    for part, lr, decay in sorted(sorted(rules), key=lambda rule: -len(rule[0])):
        if part in name:
            return lr, decay
    return 1.0, 1.0


def parameter_groups(
    model: Trainable, optim: Optim, rename: Callable[[str], str] = str
) -> list[dict[str, Any]]:
    """Group trainable parameters by their (lr factor, decay factor) for AdamW.

    ``rename`` translates our names before the rules are matched (paper presets match the released
    names). Each group holds "params", "names", "factor" (of the rate) and "weight_decay".
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = factors(rename(name), optim.rules)
        group = groups.setdefault(key, {"params": [], "names": [], "factor": key[0]})
        group["params"].append(parameter)
        group["names"].append(name)
        group["weight_decay"] = optim.weight_decay * key[1]
    return list(groups.values())


def total_steps(optim: Optim, items: int) -> int:
    """Give the number of optimiser steps; ``items`` is the size of the first stream's data set."""
    if optim.steps:
        return optim.steps + sum(steps for steps, _ in optim.restarts)
    return max(1, math.ceil(optim.epochs * items / (optim.clips or optim.images)))


def cycle_of(optim: Optim, step: int) -> tuple[int, int]:
    """Give (cycle, step within it): 0 is the schedule itself, 1 and on are its restarts."""
    lengths = [optim.steps, *(steps for steps, _ in optim.restarts)] if optim.steps else [0]
    cycle = 0
    while cycle < len(lengths) - 1 and step >= lengths[cycle]:
        step -= lengths[cycle]
        cycle += 1
    return cycle, step


def learning_rate(optim: Optim, step: int, items: int) -> float:
    """Give the base rate at a step: cosine to 0, scaled up linearly during warm-up.

    With ``stairs`` the cosine moves once per epoch; warm-up moves at every step in either case,
    and holds its last rate until the next epoch where its length isn't a whole number of steps.
    Steps beyond ``optim.steps`` run down the further cosines of ``optim.restarts``. With
    ``cosine_steps`` the first one is over before, and its last rate, ``last_share``, is held.
    """
    cycle, place = cycle_of(optim, step)
    if cycle:
        extra, share = optim.restarts[cycle - 1]
        return optim.lr * share * 0.5 * (1 + math.cos(math.pi * place / extra))
    per_epoch = items / (optim.clips or optim.images)
    unit = 1.0 if optim.steps else per_epoch  # steps in the unit of length and warm-up
    last = math.floor(optim.warmup * unit)
    # mmcv's stairs leave warm-up where step == its length, or with the next epoch. A length between
    # two steps is never met: its last rate is held. A whole one is met at ``last``: regular rate.
    if optim.stairs and math.floor(step / unit) == math.floor(last / unit):
        step = min(step, last)
    now = step / unit
    length = optim.cosine_steps / unit or optim.steps or optim.epochs
    shown = min(math.floor(now) if optim.stairs else now, length)
    way = 0.5 * (1 + math.cos(math.pi * shown / length)) if optim.cosine else 1.0
    regular = optim.lr * (optim.last_share + (1 - optim.last_share) * way)
    if now >= optim.warmup:
        return regular
    return regular * (1 - (1 - now / optim.warmup) * (1 - optim.warmup_start))


def start_average(model: Trainable) -> dict[str, Tensor]:
    """Copy the floating-point parameters and buffers, to start the EMA."""
    return {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}


def update_average(average: Mapping[str, Tensor], model: Trainable, share: float) -> None:
    """Update the exponential moving average (EMA) of the weights, in place.

    ``average <- (1 - share) average + share weights``. Source: mmcv's hook in the released SSv2
    recipe, there after every micro-iteration.
    """
    weights = model.state_dict()
    for name, mean in average.items():
        mean.lerp_(weights[name], share)
