"""Every router against its published formula, in plain fp64, one token and one adapter at a time."""

import math
from collections.abc import Callable

import pytest
import torch

from seqr.routers.arrow import ArrowRouter
from seqr.routers.base import BaseRouter
from seqr.routers.evidence import EvidenceRouter, PromptEvidenceRouter
from seqr.routers.interface import Activation, Batch, Mixture, Router, RouterMisused
from seqr.routers.lag import LagRouter
from seqr.routers.lorauter import LorauterRouter, successive_halving, task_vector
from seqr.routers.mu import MuRouter
from seqr.routers.norms import Spectrum
from seqr.routers.oracle import OracleRouter
from seqr.routers.pool import AdapterPool, LoraFactors, PoolMismatch
from seqr.routers.seqr import SeqrRouter
from seqr.routers.spectr import SpectrRouter
from seqr.routers.statistics import NormMoments, Statistics
from seqr.routing.reference import reference_choice, reference_evidence
from seqr.routing.scores import CLIP
from tests.seqr.routers.conftest import MODULES, factors, inputs, make_batch

MakePool = Callable[..., AdapterPool]


def delta(pool: AdapterPool, module: int, column: int) -> torch.Tensor:
    """B A of one adapter, dense fp64 [m, n]."""
    a = pool.a[module] if pool.shared else pool.a[module][column]
    return pool.b_t[module][column].T.double() @ a.double()


def norm(pool: AdapterPool, module: int, column: int, x: torch.Tensor) -> float:
    return float((delta(pool, module, column) @ x.double()).norm())


def alignment(pool: AdapterPool, module: int, column: int, x: torch.Tensor) -> float:
    """|v_1^T x| with v_1 from the SVD of the dense update."""
    return abs(float(torch.linalg.svd(delta(pool, module, column)).Vh[0] @ x.double()))


def statistics_of(pool: AdapterPool) -> Statistics:
    """mu and sigma over some activations of its own."""
    batch = make_batch(len(pool), (40,))
    moments = NormMoments(pool)
    for module, x in enumerate(inputs(batch, seed=99)):
        rows = [[norm(pool, module, column, token) for column in range(len(pool))] for token in x]
        moments.update(module, torch.tensor(rows))
    return moments.statistics()


def read_and_route(router: Router, pool: AdapterPool, batch: Batch, xs: list[torch.Tensor]) -> list[Mixture]:
    router.begin(batch)
    if router.reads:
        for module, x in enumerate(xs):
            router.read(Activation(pool, module, x))
    return [router.route(Activation(pool, module, x)) for module, x in enumerate(xs)]


def chosen(router: Router, pool: AdapterPool, batch: Batch, xs: list[torch.Tensor]) -> list[list[int]]:
    """Per module, the one column of every token."""
    mixtures = read_and_route(router, pool, batch, xs)
    assert all(mixture.columns.shape[1] == 1 for mixture in mixtures)
    return [mixture.columns[:, 0].tolist() for mixture in mixtures]


def reference(batch: Batch, score: Callable[[int, int, int], float], modules: int = 2) -> list[list[int]]:
    """argmax over the permitted of score(module, token, column)."""
    return [
        [
            reference_choice([score(module, token, column) for column in range(row.shape[0])], row.tolist())
            for token, row in enumerate(batch.allowed)
        ]
        for module in range(modules)
    ]


@pytest.mark.parametrize("calibrated", [True, False], ids=["z-scored", "raw"])
def test_seqr_spectr_and_lag_over_all_choose_the_norm_maximising_adapter(pool: AdapterPool, calibrated: bool) -> None:
    statistics = statistics_of(pool) if calibrated else Statistics.none(pool)
    batch = make_batch(len(pool), (30, 25))
    xs = inputs(batch)

    def score(module: int, token: int, column: int) -> float:
        mu, sigma = float(statistics.mu[module, column]), float(statistics.sigma[module, column])
        return (norm(pool, module, column, xs[module][token]) - mu) / sigma

    expected = reference(batch, score)
    assert len({column for row in expected for column in row}) > 2
    assert chosen(SeqrRouter(pool, statistics), pool, batch, xs) == expected
    assert chosen(SpectrRouter(pool, statistics), pool, batch, xs) == expected
    assert chosen(LagRouter(pool, len(pool), statistics), pool, batch, xs) == expected


def test_arrow_and_lag_of_one_choose_the_best_aligned_first_singular_vector(pool: AdapterPool) -> None:
    batch = make_batch(len(pool), (30,))
    xs = inputs(batch)
    expected = reference(batch, lambda module, token, column: alignment(pool, module, column, xs[module][token]))
    assert chosen(ArrowRouter(pool), pool, batch, xs) == expected
    assert chosen(LagRouter(pool, 1), pool, batch, xs) == expected


def test_lag_takes_the_largest_norm_among_its_k_best_arrows(pool: AdapterPool) -> None:
    batch = make_batch(len(pool), (20,))
    xs = inputs(batch)

    def score(module: int, token: int, column: int) -> float:
        x = xs[module][token]
        ranked = sorted(range(len(pool)), key=lambda i: -alignment(pool, module, i, x))
        return norm(pool, module, column, x) if column in ranked[:3] else math.nan

    assert chosen(LagRouter(pool, 3), pool, batch, xs) == reference(batch, score)


def test_arrow_misses_the_largest_norm_where_the_papers_theorem_says_so() -> None:
    # SEQR paper, appendix A: C = diag(2, 1), D = diag(3, 1) times a rotation by 45 degrees, x = (1, 0).
    c = LoraFactors(torch.eye(2), torch.diag(torch.tensor([2.0, 1.0])))
    turn = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
    d = LoraFactors(turn, torch.diag(torch.tensor([3.0, 1.0])))
    pool = AdapterPool({"C": {"only": c}, "D": {"only": d}})
    batch, xs = make_batch(2, (1,)), [torch.tensor([[1.0, 0.0]])]
    assert chosen(ArrowRouter(pool), pool, batch, xs) == [[0]]
    assert chosen(SeqrRouter(pool), pool, batch, xs) == chosen(SpectrRouter(pool), pool, batch, xs) == [[1]]


def test_spectr_without_singular_values_could_not_tell_adapters_of_one_a_apart() -> None:
    pool = AdapterPool({f"adapter-{i}": factors(i + 1, True) for i in range(4)})
    x = torch.randn(5, 24)
    spectrum = Spectrum(pool)
    directions = spectrum.scaled[0] / spectrum.scaled[0].norm(dim=2, keepdim=True)
    published = torch.einsum("nrk,tk->tnr", directions, x).norm(dim=2)
    assert float((published - published[:, :1]).abs().max()) < 1e-4
    fair = spectrum.norms(Activation(pool, 0, x))
    assert float((fair - fair[:, :1]).abs().max()) > 0.5


def test_arrow_of_several_mixes_by_a_softmax_of_the_scores(pool: AdapterPool) -> None:
    batch = make_batch(len(pool), (8,))
    xs = inputs(batch)
    for module, mixture in enumerate(read_and_route(ArrowRouter(pool, top_k=3, temperature=0.5), pool, batch, xs)):
        for token, x in enumerate(xs[module]):
            scores = {column: alignment(pool, module, column, x) for column in range(len(pool))}
            best = sorted(scores, key=lambda column: -scores[column])[:3]
            weights = [math.exp(scores[column] / 0.5) for column in best]
            assert mixture.columns[token].tolist() == best
            expected = torch.tensor([weight / sum(weights) for weight in weights])
            torch.testing.assert_close(mixture.weights[token], expected, rtol=1e-4, atol=1e-5)


def test_mu_weighs_the_permitted_adapters_alike(pool: AdapterPool) -> None:
    permitted = torch.tensor([[True, False, True, True, False]])
    batch = make_batch(len(pool), (3,), permitted=permitted)
    mixture = read_and_route(MuRouter(pool), pool, batch, inputs(batch))[0]
    assert mixture.columns.tolist() == [[0, -1, 2, 3, -1]] * 3
    torch.testing.assert_close(mixture.weights, permitted.float().expand(3, 5) / 3)


def test_the_oracle_uses_the_adapter_it_is_told_if_it_is_permitted(pool: AdapterPool) -> None:
    permitted = torch.ones(3, len(pool), dtype=torch.bool)
    permitted[1, 4] = False
    batch = make_batch(len(pool), (2, 2, 1), permitted=permitted)
    router = OracleRouter(pool, lambda batch: torch.tensor([2, 4, 0]))
    assert chosen(router, pool, batch, inputs(batch)) == [[2, 2, -1, -1, 0, -1]] * 2


def test_evidence_in_one_pass_is_the_sum_over_tokens_and_modules_so_far(pool: AdapterPool) -> None:
    statistics = statistics_of(pool)
    batch = make_batch(len(pool), (9, 5))
    xs = inputs(batch)
    got = chosen(EvidenceRouter(pool, statistics), pool, batch, xs)
    for sequence, length in enumerate((9, 5)):
        tokens = [sequence * 9 + position for position in range(length)]
        scores = [
            [
                [
                    (norm(pool, module, i, xs[module][t]) - float(statistics.mu[module, i]))
                    / float(statistics.sigma[module, i])
                    for i in range(len(pool))
                ]
                for t in tokens
            ]
            for module in range(2)
        ]
        values = reference_evidence(scores)
        for module in range(2):
            expected = [reference_choice(values[module][p], [True] * len(pool)) for p in range(length)]
            assert [got[module][t] for t in tokens] == expected
    assert got[0][14:] == [-1] * 4


def test_evidence_of_the_prompt_sums_its_words_alone_and_holds_for_the_whole_sequence(pool: AdapterPool) -> None:
    statistics = statistics_of(pool)
    batch = make_batch(len(pool), (9, 7), options=3)
    xs = inputs(batch)
    router = PromptEvidenceRouter(pool, statistics)
    got = chosen(router, pool, batch, xs)
    for sequence, length in enumerate((9, 7)):
        words = [sequence * 9 + position for position in range(1, length - 3)]
        weights = [0.5 ** ((words[-1] - t) / 6) for t in words] * 2
        sums = []
        for i in range(len(pool)):
            scores = [
                (norm(pool, module, i, xs[module][t]) - float(statistics.mu[module, i]))
                / float(statistics.sigma[module, i])
                for module in range(2)
                for t in words
            ]
            clipped = [max(-CLIP, min(CLIP, score)) for score in scores]
            sums.append(sum(w * score for w, score in zip(weights, clipped, strict=True)) / sum(weights))
        expected_sums = torch.tensor(sums, dtype=torch.float64)
        torch.testing.assert_close(router.evidence()[sequence], expected_sums, rtol=0, atol=1e-4)
        best = reference_choice(sums, [True] * len(pool))
        expected = [best] * length + [-1] * (9 - length)
        assert got[0][sequence * 9 : sequence * 9 + 9] == got[1][sequence * 9 : sequence * 9 + 9] == expected


def test_below_the_threshold_nobody_is_chosen(pool: AdapterPool) -> None:
    batch = make_batch(len(pool), (9,))
    xs = inputs(batch)
    always = PromptEvidenceRouter(pool, statistics_of(pool))
    assert chosen(always, pool, batch, xs)[0][0] >= 0
    best = float(always.evidence().max())
    for threshold, silent in ((best - 0.01, False), (best + 0.01, True)):
        router = PromptEvidenceRouter(pool, statistics_of(pool), threshold=threshold)
        assert (chosen(router, pool, batch, xs)[0][0] == -1) is silent


def test_lorauter_mixes_the_nearest_tasks_by_a_softmax_of_cosines(pool: AdapterPool) -> None:
    tasks = {f"task-{i}": torch.randn(8, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    query = torch.randn(2, 8, generator=torch.Generator().manual_seed(50))
    router = LorauterRouter(pool, lambda texts: query[: len(texts)], tasks, {t: f"adapter-{t[-1]}" for t in tasks})
    batch = make_batch(len(pool), (2, 3))
    first, second = read_and_route(router, pool, batch, inputs(batch))
    assert torch.equal(first.columns, second.columns) and torch.equal(first.weights, second.weights)
    for sequence, token in ((0, 0), (1, 3)):
        cosine = [float(torch.cosine_similarity(query[sequence], vector, dim=0)) for vector in tasks.values()]
        best = sorted(range(5), key=lambda i: -cosine[i])[:3]
        weights = [math.exp(cosine[i] / 0.2) for i in best]
        assert first.columns[token].tolist() == best
        torch.testing.assert_close(first.weights[token], torch.tensor([w / sum(weights) for w in weights]))
    assert first.columns[2].tolist() == [-1, -1, -1]


def test_lorauter_refuses_a_task_that_no_adapter_of_the_pool_serves(pool: AdapterPool) -> None:
    with pytest.raises(RouterMisused, match="task weather has no adapter"):
        LorauterRouter(pool, lambda texts: torch.zeros(1, 2), {"weather": torch.ones(2)}, {"weather": "gone"})


def test_a_task_vector_is_the_mean_of_at_most_two_hundred_embeddings() -> None:
    seen: list[int] = []

    def encoder(texts: list[str]) -> torch.Tensor:
        seen.append(len(texts))
        return torch.arange(float(len(texts)))[:, None]

    assert task_vector(encoder, ["x"] * 300).tolist() == [99.5]
    assert seen == [200]


def test_successive_halving_finds_the_best_adapter_in_fewer_evaluations_than_trying_all_on_everything() -> None:
    quality = {f"adapter-{i}": i / 20 for i in range(16)}
    asked: list[int] = []

    def accuracy(name: str, rows: int) -> float:
        asked.append(rows)
        return quality[name]

    assert successive_halving(list(quality), accuracy, rows=200) == "adapter-15"
    assert sum(asked) < 16 * 200 / 2
    with pytest.raises(RouterMisused, match="at least one adapter"):
        successive_halving([], accuracy, rows=200)


def every_router(pool: AdapterPool) -> dict[str, Router]:
    statistics = statistics_of(pool)
    tasks = {name: torch.randn(4, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(pool.names)}
    return {
        "base": BaseRouter(pool),
        "oracle": OracleRouter(pool, lambda batch: torch.zeros(batch.lengths.shape[0], dtype=torch.int64)),
        "mu": MuRouter(pool),
        "arrow": ArrowRouter(pool),
        "arrow of three": ArrowRouter(pool, top_k=3),
        "spectr": SpectrRouter(pool, statistics),
        "lag": LagRouter(pool, 2, statistics),
        "seqr": SeqrRouter(pool, statistics),
        "evidence": EvidenceRouter(pool, statistics),
        "prompt_evidence": PromptEvidenceRouter(pool, statistics),
        "lorauter": LorauterRouter(pool, lambda texts: torch.ones(len(texts), 4), tasks, {t: t for t in tasks}),
    }


ROUTERS = ("base", "oracle", "mu", "arrow", "arrow of three", "spectr", "lag", "seqr", "evidence", "prompt_evidence")
ROUTERS += ("lorauter",)


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_and_whoever_may_use_nothing_get_no_adapter(pool: AdapterPool, name: str) -> None:
    permitted = torch.ones(3, len(pool), dtype=torch.bool)
    permitted[1] = False
    batch = make_batch(len(pool), (4, 4, 2), permitted=permitted)
    for mixture in read_and_route(every_router(pool)[name], pool, batch, inputs(batch)):
        nobody = torch.tensor([4, 5, 6, 7, 10, 11])
        assert bool((mixture.columns[nobody] == -1).all())


@pytest.mark.parametrize("name", ROUTERS)
def test_a_forbidden_adapter_is_never_chosen_and_its_nans_change_nothing(make_pool: MakePool, name: str) -> None:
    pool, poisoned = make_pool(), make_pool()
    for b_t in poisoned.b_t:
        b_t[3] = torch.nan
    permitted = torch.ones(2, len(pool), dtype=torch.bool)
    permitted[:, 3] = False
    batch = make_batch(len(pool), (7, 5), permitted=permitted)
    xs = inputs(batch)
    sound = read_and_route(every_router(pool)[name], pool, batch, xs)
    with_nans = read_and_route(every_router(poisoned)[name], poisoned, batch, xs)
    for one, other in zip(sound, with_nans, strict=True):
        assert not bool((one.columns == 3).any())
        assert torch.equal(one.columns, other.columns) and torch.equal(one.weights, other.weights)


@pytest.mark.parametrize("name", ROUTERS)
def test_an_empty_pool_routes_to_nobody(name: str) -> None:
    pool = AdapterPool({}, tuple(MODULES))
    batch = make_batch(0, (3, 2))
    router = every_router(pool)[name] if name != "oracle" else BaseRouter(pool)
    for mixture in read_and_route(router, pool, batch, inputs(batch)):
        assert bool((mixture.columns == -1).all())


def test_a_pool_refuses_adapters_of_another_rank_or_of_other_modules() -> None:
    first = factors(1, True)
    with pytest.raises(PoolMismatch, match=r"adapter wide has A, B of shapes .* in first"):
        AdapterPool({"one": first, "wide": factors(2, True, rank=6)})
    with pytest.raises(PoolMismatch, match=r"adapter half differs .* adapts second"):
        AdapterPool({"one": first, "half": {"first": first["first"]}})
    with pytest.raises(PoolMismatch, match="there is no adapter two in this pool; it has one"):
        AdapterPool({"one": first}).column("two")


def test_noise_moves_every_mu_by_that_many_deviations() -> None:
    statistics = Statistics(torch.full((40, 50), 3.0).double(), torch.full((40, 50), 2.0).double())
    moved = (statistics.shifted(0.5, seed=1).mu - 3.0) / 2.0
    assert abs(float(moved.std()) - 0.5) < 0.03 and abs(float(moved.mean())) < 0.05
    assert torch.equal(statistics.shifted(0.5, seed=1).mu, statistics.shifted(0.5, seed=1).mu)
