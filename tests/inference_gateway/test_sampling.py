"""A request's tokens follow from its own logits, options and seed, as a slow reference says."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from inference_gateway.engine import sampling as engine_sampling
from inference_gateway.engine.base import Sampling
from inference_gateway.engine.sampling import GREEDY_BELOW, Sampler, logprobs_of, sampler_of
from tests.inference_gateway.sampling_reference import adjusted, distribution, softmax

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])
V = 12


class Only:
    """A grammar that allows the same tokens always."""

    def __init__(self, allowed: list[bool]):
        self._allowed = torch.tensor(allowed)
        self.accepted: list[int] = []

    def allowed(self) -> torch.Tensor:
        return self._allowed

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def counts(sampling: Sampling, draws: int = 4000) -> list[float]:
    sampler = Sampler(sampling)
    drawn = torch.tensor([sampler.next(LOGITS) for _ in range(draws)])
    return (torch.bincount(drawn, minlength=4) / draws).tolist()


# Logits a tenth apart at least: where two are equal, either may be the larger.
logits_strategy = st.permutations(range(V)).flatmap(
    lambda order: st.floats(0.1, 1.5).map(lambda step: [(place - V / 2) * step for place in order])
)
options = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.7, 1.0, 2.0]),
        "top_p": st.sampled_from([0.0, 0.31, 0.71, 0.93, 1.0]),
        "top_k": st.sampled_from([0, 1, 3, 7, 50]),
        "min_p": st.sampled_from([0.0, 0.013, 0.17, 1.0]),
        "presence_penalty": st.sampled_from([0.0, 0.37, -1.13]),
        "frequency_penalty": st.sampled_from([0.0, 0.41, -0.29]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.77]),
        "logit_bias": st.sampled_from([(), ((3, -100.0),), ((0, 1.37), (5, -2.11))]),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    logits_strategy,
    options,
    st.lists(st.integers(0, V - 1), max_size=4),
    st.lists(st.booleans(), min_size=V, max_size=V),
)
def test_what_may_be_drawn_is_what_the_reference_keeps(
    logits: list[float], asked: dict[str, Any], prompt: list[int], allowed: list[bool]
) -> None:
    grammar = Only(allowed) if any(allowed) else None
    sampler = Sampler(Sampling(**asked, seed=11), prompt, grammar)
    answer: list[int] = []
    for _ in range(6):
        kept = distribution(logits, Sampling(**asked), prompt, answer, allowed if grammar else None)
        token = sampler.next(torch.tensor(logits, dtype=torch.float64))
        assert token in kept
        answer.append(token)
    assert grammar is None or grammar.accepted == answer


@settings(max_examples=60, deadline=None)
@given(logits_strategy, options)
def test_draws_are_the_references_inverse_distribution_function(logits: list[float], asked: dict[str, Any]) -> None:
    """The same uniform number picks the same token, in the order in which the tokens are kept."""
    sampler = Sampler(Sampling(**asked, seed=5))
    uniform = float(torch.rand((), generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    kept = distribution(logits, Sampling(**asked))
    if asked["top_k"] == 0 and asked["min_p"] == 0 and asked["top_p"] == 1.0:
        kept = dict(sorted(kept.items()))
    mass, expected = 0.0, -1
    for token, one in kept.items():
        mass += one
        expected = token
        if mass > uniform:
            break
    assert sampler.next(torch.tensor(logits, dtype=torch.float64)) == expected


def test_a_thousand_biases_take_as_many_operations_as_one() -> None:
    class Counting(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operations += 1
            return func(*args, **(kwargs or {}))

    def operations(biases: int) -> int:
        sampler = Sampler(Sampling(logit_bias=tuple((token, 1.0) for token in range(biases))))
        with Counting() as counting:
            sampler.next(torch.arange(2048.0))
        return counting.operations

    assert operations(1024) == operations(1)


def test_biases_of_the_same_token_add_up() -> None:
    sampler = Sampler(Sampling(logit_bias=((2, 1.5), (2, 1.0), (0, 0.25))))
    assert sampler.next(LOGITS) == 2  # 0.0 + 2.5 against 2.0 + 0.25


@settings(max_examples=60, deadline=None)
@given(logits_strategy, options, st.lists(st.integers(0, V - 1), max_size=4))
def test_greedy_answers_take_the_largest_adjusted_logit(
    logits: list[float], asked: dict[str, Any], prompt: list[int]
) -> None:
    greedy = Sampling(**{**asked, "temperature": 0.0})
    sampler, answer = Sampler(greedy, prompt), []
    for _ in range(5):
        scores = adjusted(logits, greedy, prompt, answer)
        answer.append(sampler.next(torch.tensor(logits, dtype=torch.float64)))
        assert scores[answer[-1]] == pytest.approx(max(scores))


@pytest.mark.parametrize("asked", [{"top_k": 1500}, {"top_p": 0.9999}, {"min_p": 1e-6}, {"top_k": 40}, {"top_p": 0.3}])
def test_a_large_vocabulary_is_cut_as_a_full_sort_would(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 2
    fast = [Sampler(Sampling(1.0, **asked, seed=seed)).next(logits) for seed in range(40)]
    monkeypatch.setattr(engine_sampling, "SORTED_FIRST", 5000)
    assert [Sampler(Sampling(1.0, **asked, seed=seed)).next(logits) for seed in range(40)] == fast
    assert len(set(fast)) > 5


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
    first, second = Sampler(Sampling(1.0, seed=3)), Sampler(Sampling(1.0, seed=3))
    other = Sampler(Sampling(1.0, seed=4))
    state = torch.random.get_rng_state()
    left = [first.next(LOGITS) for _ in range(20)]
    right = []
    for _ in range(20):
        other.next(LOGITS)
        right.append(second.next(LOGITS))
    assert left == right
    assert torch.equal(state, torch.random.get_rng_state())


def test_log_probabilities_are_those_of_the_raw_distribution() -> None:
    asked = Sampling(temperature=0.5, top_k=1, logit_bias=((3, 50.0),), logprobs=2, seed=1)
    sampler = Sampler(asked)
    assert sampler.next(LOGITS) == 3
    (told,) = sampler.take(5)
    expected = [math.log(one) for one in softmax(LOGITS.tolist())]
    assert told.logprob == pytest.approx(expected[3], abs=1e-9)
    assert [token for token, _ in told.top] == [0, 1]
    assert [one for _, one in told.top] == pytest.approx(expected[:2], abs=1e-9)
    assert sampler.take(1) == ()


def test_no_alternatives_are_told_when_none_are_asked_for() -> None:
    assert logprobs_of(LOGITS, 0, 0).top == ()
    assert len(logprobs_of(LOGITS, 0, 20).top) == 4


def test_a_temperature_next_to_nothing_is_greedy() -> None:
    assert Counter(Sampler(Sampling(1e-300, seed=1)).next(LOGITS) for _ in range(20)) == {0: 20}


@pytest.mark.parametrize("penalty", [5e-324, 1e-308])
@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"min_p": 0.1}, {"top_p": 0.5}])
def test_a_repetition_penalty_next_to_nothing_leaves_only_likely_tokens_that_were_seen(
    penalty: float, cut: dict[str, Any]
) -> None:
    for temperature in (GREEDY_BELOW, 1.0, 2.0):
        sampler = Sampler(
            Sampling(temperature=temperature, repetition_penalty=penalty, seed=3, **cut), prompt=(1, 2, 3)
        )
        assert sampler.next(LOGITS) == 1  # the only one of the prompt's with a logit above 0
    greedy = sampler_of(Sampling(repetition_penalty=penalty), (1, 2, 3))
    assert greedy is not None and greedy.next(LOGITS) == 1


def test_logits_stay_as_they_were() -> None:
    before = LOGITS.clone()
    asked = Sampling(1.0, repetition_penalty=2.0, logit_bias=((0, -5.0),), seed=1)
    Sampler(asked, [0, 1], Only([True, True, False, False])).next(LOGITS)
    assert torch.equal(before, LOGITS)


def test_plain_greedy_decoding_costs_nothing_per_request() -> None:
    assert sampler_of(Sampling(0.0, 0.5, seed=3, stop_ids=(5,)), [1]) is None
    for asked in ({"logprobs": 0}, {"logit_bias": ((1, 1.0),)}, {"presence_penalty": 1}, {"repetition_penalty": 1.1}):
        assert sampler_of(Sampling(0.0, **asked), [1]) is not None
