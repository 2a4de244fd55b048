"""Parameter groups and learning rates, as functions of names and of the step."""

import math
from collections.abc import Iterable

from torch import nn

from bevt_lib.config import Optim

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


def parameter_groups(model: nn.Module, optim: Optim, rename=lambda name: name) -> list[dict]:
    """Group trainable parameters by their (lr factor, decay factor) for AdamW.

    ``rename`` translates our names before the rules are matched (paper presets match the released
    names). Each group holds "params", "names", "factor" (of the rate) and "weight_decay".
    """
    groups: dict[tuple[float, float], dict] = {}
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
    """Tell (cycle, step within it): 0 is the schedule itself, 1 and on are its restarts."""
    lengths = [optim.steps, *(steps for steps, _ in optim.restarts)] if optim.steps else [0]
    cycle = 0
    while cycle < len(lengths) - 1 and step >= lengths[cycle]:
        step -= lengths[cycle]
        cycle += 1
    return cycle, step


def learning_rate(optim: Optim, step: int, items: int) -> float:
    """Give the base rate at a step: cosine to 0, scaled up linearly during warm-up.

    With ``stairs`` the cosine moves once per epoch; warm-up moves at every step in either case.
    Steps beyond ``optim.steps`` run down the further cosines of ``optim.restarts``.
    """
    cycle, place = cycle_of(optim, step)
    if cycle:
        extra, share = optim.restarts[cycle - 1]
        return optim.lr * share * 0.5 * (1 + math.cos(math.pi * place / extra))
    per_epoch = items / (optim.clips or optim.images)
    unit = 1.0 if optim.steps else per_epoch  # steps in the unit of length and warm-up
    now, length = step / unit, optim.steps or optim.epochs
    shown = math.floor(now) if optim.stairs else now
    regular = optim.lr * (0.5 * (1 + math.cos(math.pi * shown / length)) if optim.cosine else 1.0)
    if now >= optim.warmup:
        return regular
    return regular * (1 - (1 - now / optim.warmup) * (1 - optim.warmup_start))
