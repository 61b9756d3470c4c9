"""Draws follow the probabilities, the seed and top_p, request by request."""

import torch

from inference_gateway.engine.base import Sampling
from inference_gateway.engine.sampling import Draw, draw_of

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


def counts(sampling: Sampling, draws: int = 4000) -> list[float]:
    draw = Draw(sampling)
    drawn = torch.tensor([draw.token(LOGITS) for _ in range(draws)])
    return (torch.bincount(drawn, minlength=4) / draws).tolist()


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    for temperature in (0.5, 1.0, 2.0):
        expected = torch.softmax(LOGITS / temperature, 0).tolist()
        got = counts(Sampling(temperature, 1.0, seed=1))
        assert all(abs(a - b) < 0.03 for a, b in zip(got, expected, strict=True))


def test_top_p_keeps_the_smallest_set_of_enough_mass() -> None:
    # softmax: 0.64, 0.24, 0.09, 0.03
    assert counts(Sampling(1.0, 0.6, seed=1), 200) == [1.0, 0.0, 0.0, 0.0]
    kept = counts(Sampling(1.0, 0.7, seed=1))
    assert kept[2:] == [0.0, 0.0] and abs(kept[0] - 0.73) < 0.03
    assert counts(Sampling(1.0, 0.0, seed=1), 50) == [1.0, 0.0, 0.0, 0.0]


def test_a_seed_repeats_and_its_draws_do_not_touch_other_requests() -> None:
    first, second = Draw(Sampling(1.0, 1.0, seed=3)), Draw(Sampling(1.0, 1.0, seed=3))
    other = Draw(Sampling(1.0, 1.0, seed=4))
    state = torch.random.get_rng_state()
    left = [first.token(LOGITS) for _ in range(20)]
    right = []
    for _ in range(20):
        other.token(LOGITS)
        right.append(second.token(LOGITS))
    assert left == right
    assert torch.equal(state, torch.random.get_rng_state())


def test_temperature_zero_draws_nothing() -> None:
    assert draw_of(Sampling(0.0, 0.5, seed=3)) is None
