"""What the benchmark measures is what the routers do, each against a slow way to the same answer."""

from dataclasses import replace

import pytest
import torch

from seqr.bench.paper.distractors import distractors, growing_evidence
from seqr.bench.paper.evidence_study import RULES, Variant, evidence
from seqr.bench.paper.extras import Extras
from seqr.bench.paper.measuring import Measuring
from seqr.bench.paper.reading import look_at, read
from seqr.bench.paper.routed import averaged, run, with_columns
from seqr.bench.paper.scoring import answers
from seqr.bench.paper.tasks import Example
from seqr.bench.paper.training import train_adapter
from seqr.bench.paper.workbench import Workbench
from seqr.public_text import public_texts
from seqr.routers.evidence import PromptEvidenceRouter
from seqr.routers.interface import Batch
from seqr.routers.mixture_model import MixtureModel, hidden_states
from seqr.routers.mu import MuRouter
from seqr.routers.pool import AdapterPool, LoraFactors
from seqr.shared_a import draw_a


@pytest.fixture(scope="module")
def measuring(bench: Workbench) -> Measuring:
    return Measuring(bench)


def log_likelihoods(model: torch.nn.Module, example: Example) -> list[float]:
    """One candidate at a time, one token at a time."""
    scores = []
    for candidate, weight in zip(example.candidates, example.weights, strict=True):
        total, tokens = 0.0, list(example.prompt)
        for token in candidate:
            with torch.inference_mode():
                logits = model(torch.tensor([tokens])).logits[0, -1]
            total += float(torch.log_softmax(logits, -1)[token])
            tokens.append(token)
        scores.append(total / weight)
    return scores


@pytest.mark.parametrize("task", ["sst2", "hellaswag"])
def test_the_answer_is_the_candidate_of_largest_log_likelihood(bench: Workbench, task: str) -> None:
    examples = bench.test_examples(task)
    slow = [max(range(len(s)), key=s.__getitem__) for s in (log_likelihoods(bench.model, e) for e in examples)]
    assert answers(bench.model, examples, 0, bench.pad_token) == slow


def test_of_equal_candidates_the_first_is_the_answer(bench: Workbench) -> None:
    same = Example("x", (5, 6, 7), ((9,), (9,)), (1.0, 1.0), 1)
    assert answers(bench.model, [same], 0, bench.pad_token) == [0]


def test_norms_are_those_of_the_adapters_outputs(bench: Workbench) -> None:
    pool, prompts = bench.pool(0), [e.prompt for e in bench.test_examples("sst2")]
    got = read(bench.model, pool, prompts, bench.pad_token)
    module, column, sequence = 3, 1, 2
    seen: list[torch.Tensor] = []
    linear = bench.model.get_submodule(pool.modules[module])
    handle = linear.register_forward_hook(lambda _m, inputs, _y: seen.append(inputs[0][0].double()))
    with torch.inference_mode():
        bench.model(torch.tensor([prompts[sequence]]))
    handle.remove()
    update = pool.b_t[module][column].T.double() @ pool.a[module].double()
    slow = (seen[0][1:] @ update.T).norm(dim=1)
    torch.testing.assert_close(got.norms[got.row == sequence][:, module, column].double(), slow, rtol=1e-4, atol=1e-6)


def test_evidence_from_stored_norms_is_that_of_the_products_router(bench: Workbench, measuring: Measuring) -> None:
    examples = bench.test_examples("cola")
    got = evidence(measuring.norms("cola", 0), measuring.public_statistics(0), Variant())
    pool = bench.pool(0)
    router = PromptEvidenceRouter(pool, measuring.public_statistics(0))
    batch, ids = Batch.of([e.prompt for e in examples], len(pool), bench.pad_token)
    mixed = MixtureModel(bench.model, pool)
    with torch.inference_mode(), mixed.routed(router, batch, ids):
        pass
    mixed.close()
    torch.testing.assert_close(got, router.evidence(), rtol=1e-3, atol=1e-3)


def test_prompt_evidence_answers_as_its_router_does_in_the_model(bench: Workbench, measuring: Measuring) -> None:
    for own, task in enumerate(bench.settings.tasks):
        got = Extras(measuring).prompt_evidence("prompt_evidence", task, 0)
        router = PromptEvidenceRouter(bench.pool(0), measuring.public_statistics(0))
        slow = run(bench.model, router, bench.test_examples(task), own, bench.pad_token)
        assert got["predicted"] == slow.predicted
        assert got["share"] == pytest.approx(slow.share)


def test_mu_with_one_averaged_adapter_answers_as_its_router_does(bench: Workbench) -> None:
    examples = bench.test_examples("sst2")
    fast = with_columns(bench.model, averaged(bench.pool(0)), examples, [0] * len(examples), bench.pad_token)
    assert fast == run(bench.model, MuRouter(bench.pool(0)), examples, 0, bench.pad_token).predicted


def test_rows_and_adapters_that_have_met_are_looked_up(bench: Workbench, measuring: Measuring) -> None:
    examples = bench.test_examples("sst2")
    columns = [row % len(bench.pool(0)) for row in range(len(examples))]
    fresh = with_columns(bench.model, bench.pool(0), examples, columns, bench.pad_token)
    assert measuring.given("sst2", 0, columns) == fresh == measuring.given("sst2", 0, columns)


def test_the_oracle_has_only_its_own_adapter_and_its_share_is_whole(measuring: Measuring) -> None:
    assert measuring.answered("oracle", "cola", 0)["share"] == [1.0] * 6


def test_the_same_rows_seed_and_recipe_train_the_same_bytes_and_leave_the_model_as_it_was(bench: Workbench) -> None:
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    examples = bench.train_examples("sst2", 0)

    def train() -> dict[str, torch.Tensor]:
        trained = train_adapter(bench.model, bench.modules, examples, 0, bench.settings.recipe, 0, True)
        return {name: factors.b for name, factors in trained.items()}

    first, second = train(), train()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(bool(b.any()) for b in first.values())
    after = bench.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("shared", [True, False])
def test_a_shared_a_is_drawn_and_frozen_and_an_own_one_learns(bench: Workbench, shared: bool) -> None:
    examples = bench.train_examples("sst2", 0)
    # A has no gradient before B has moved, and the first step of the warm-up moves nothing.
    recipe = replace(bench.settings.recipe, epochs=3)
    trained = train_adapter(bench.model, bench.modules, examples, 0, recipe, 5, shared)
    drawn = {name: draw_a(5, name, bench.settings.recipe.rank, inputs) for name, (_, inputs) in bench.modules.items()}
    assert all(torch.equal(trained[name].a, drawn[name]) for name in drawn) is shared


def test_padding_tokens_say_nothing(bench: Workbench) -> None:
    prompts = [e.prompt for e in bench.test_examples("sst2")]
    alone = read(bench.model, bench.pool(0), prompts[:1], bench.pad_token)
    longer = read(bench.model, bench.pool(0), [prompts[0], prompts[0] + prompts[1]], bench.pad_token)
    torch.testing.assert_close(longer.norms[longer.row == 0], alone.norms, rtol=1e-4, atol=1e-5)
    batch, ids = Batch.of([prompts[0]], 0, bench.pad_token)
    assert hidden_states(bench.model, ids, batch).shape[1] == len(alone.row) + 1


def test_words_are_counted_from_either_end_of_each_prompt() -> None:
    row = torch.tensor([0, 0, 0, 1, 1])
    assert Variant(words="first 2").weights(row).tolist() == [True, True, False, True, True]
    assert Variant(words="without first 2").weights(row).tolist() == [False, False, True, False, False]
    assert Variant(words="last 1").weights(row).tolist() == [False, False, True, False, True]
    assert Variant(words="without last 1").weights(row).tolist() == [True, True, False, True, False]
    assert Variant(words="half-life 1").weights(row).tolist() == [0.25, 0.5, 1, 0.5, 1]


def test_evidence_among_distractors_is_the_rules_own_evidence_of_a_pool_that_has_them(
    bench: Workbench, measuring: Measuring
) -> None:
    """``growing_evidence`` keeps no norms; a pool that holds the distractors, read as any other, says the same."""
    pool, prompts = bench.pool(0), [e.prompt for e in bench.test_examples("cola")]
    texts = [bench.tokenizer(text)["input_ids"] for text in public_texts()[:20]]
    public, _ = look_at(bench.model, pool, texts, bench.pad_token, lambda a: a.z)
    z, row = look_at(bench.model, pool, prompts, bench.pad_token, lambda a: a.z)
    got = growing_evidence(pool, public, z, row, 5, RULES)

    made = distractors(pool, range(5), 5)
    parts = [
        {m: LoraFactors(one.a[i], one.b_t[i][column].T) for i, m in enumerate(one.modules)}
        for one in (pool, made)
        for column in range(len(one))
    ]
    grown = AdapterPool({str(number): part for number, part in enumerate(parts)}, pool.modules)
    statistics = read(bench.model, grown, texts, bench.pad_token).statistics()
    norms = read(bench.model, grown, prompts, bench.pad_token)
    for rule, variant in RULES.items():
        torch.testing.assert_close(got[rule], evidence(norms, statistics, variant), atol=2e-3, rtol=2e-3)
