"""Copying as a baseline: against slow loops, on a scene that can be worked out by hand."""

import math
from collections import Counter
from types import MappingProxyType

import numpy as np
import pytest
import torch

from bevt_lib.scoring.tokens import (
    AtDistance,
    copy_nearest,
    copy_table,
    hidden_places,
    score_tokens,
)

V, T = 5, 6


@pytest.fixture(scope="module")
def drawn():
    """Ids (3, T, 2, 2) of V words, and hidden places; one place is hidden in all frames."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (3, T, 2, 2), generator=rng)
    hidden = torch.rand(3, T, 2, 2, generator=rng) < 0.6
    hidden[0, :, 0, 0] = True
    return ids, hidden


def slow_places(ids, hidden):
    """List (id, guess, distance); of two frames equally near the earlier; -1 and 0 for none."""
    found = []
    for b, t, y, x in hidden.nonzero().tolist():
        near = sorted((abs(s - t), s) for s in range(ids.shape[1]) if not hidden[b, s, y, x])
        distance, frame = near[0] if near else (0, None)
        guess = -1 if frame is None else int(ids[b, frame, y, x])
        found.append((int(ids[b, t, y, x]), guess, distance))
    return found


def test_hidden_places_are_copied_from_the_nearest_frame(drawn):
    ids, hidden = drawn
    found = slow_places(ids, hidden)
    assert hidden_places(ids, hidden).T.tolist() == [list(place) for place in found]
    assert {d for _, _, d in found} >= {0, 1, 2, 3}
    guess, distance = copy_nearest(ids, hidden)
    assert torch.equal(guess[~hidden], ids[~hidden]) and not distance[~hidden].any()


def test_a_copy_table_is_counted_and_smoothed(drawn):
    """Each row against counters, at the weight that a loop finds best on validation places."""
    places = hidden_places(*drawn)
    train, val = places[:, ::2], places[:, 1::2]
    table = copy_table(train, val, V, T)
    pairs, unigram = Counter(map(tuple, train.T.tolist())), Counter(train[0].tolist())

    def p(true, guess, distance, weight):
        row = sum(pairs[i, guess, distance] for i in range(V))
        prior = (unigram[true] + 0.5) / (train.shape[1] + 0.5 * V)
        return (pairs[true, guess, distance] + weight * prior) / (row + weight)

    for d in set(val[2].tolist()):
        at = [place for place in val.T.tolist() if place[2] == d]
        nats = {
            w: -sum(math.log(p(*place, w)) for place in at) for w in (5, 10, 20, 40, 80, 160, 320)
        }
        weight = min(nats, key=nats.get)
        for guess in range(-1 if d == 0 else 0, 0 if d == 0 else V):
            slow = [math.log(p(true, guess, d, weight)) for true in range(V)]
            assert torch.allclose(table[d, guess], torch.tensor(slow, dtype=torch.float64))
    assert torch.allclose(table.exp().sum(-1), torch.ones(T, V, dtype=torch.float64))


class Still:
    """One clip of 4 frames with 2 x 2 ids: at the first place 0 1 2 3, elsewhere 7 throughout."""

    vocab_size, factor = 8, 1
    ids = torch.full((4, 2, 2), 7)
    ids[:, 0, 0] = torch.arange(4)

    def sample(self, epoch, index):
        mask = np.zeros((4, 2, 2), dtype=bool)
        mask[1:, 0] = True  # three frames of the upper row
        shown = self.ids.numpy().astype(np.uint8)[..., None].repeat(3, -1)
        return {"pixels": np.zeros((4, 2, 2, 3), np.uint8), "mask": mask, "tokenizer_input": shown}

    def encode(self, view):
        return view[..., 0].long()


class Says:
    """A model that is sure of id 2 at every place."""

    frames_per_step = MappingProxyType({"video": 1})

    def eval(self):
        return self

    def parameters(self):
        return iter([torch.zeros(1)])

    def features(self, stream, pixels, mask):
        return mask

    def token_head(self, mask):
        return torch.eye(8)[torch.full(mask.shape, 2)] * 100


def test_a_score_tells_prediction_from_copying_by_distance():
    """Hidden are 1 2 3 at the first place and 7 7 7 beside it; frame 0 shows 0 and 7."""
    score = score_tokens(Says(), Still(), "video", Still(), 1)
    assert score.places == 6 and score.accuracy == pytest.approx(1 / 6) and score.copy == 0.5
    assert score.by_distance == {
        1: AtDistance(2, 0.0, 0.5, 100.0),
        2: AtDistance(2, 0.5, 0.5, 50.0),
        3: AtDistance(2, 0.0, 0.5, 100.0),
    }
