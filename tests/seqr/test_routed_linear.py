"""y = W x + Q R A x for the one adapter chosen, and W x, bit for bit, where there is none."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqr import routed_linear
from seqr.adapter import Adapter
from seqr.library import Library, PermissionRows
from seqr.models import load_base_model
from seqr.plan import Plan
from seqr.routed_linear import ModelMismatch, RoutedLinear, adapt_model, add_adapters, add_rows
from seqr.routing.evidence import EvidenceState
from seqr.routing.groups import Groups
from seqr.routing.reference import reference_output
from seqr.shared_a import verify_a
from seqr.step import (
    Segment,
    StepContext,
    StepMismatch,
    StepMissing,
    base_only,
    get_context,
    reset_context,
    running,
    set_context,
)
from tests.seqr.strategies import ToyModel, broken, shared_a, toy_adapter, toy_library, toy_plan

pytestmark = pytest.mark.usefixtures("either_way")
PLAN = toy_plan()
A = shared_a(PLAN)
POPULARITY = {
    "all distinct": [*range(12)],
    "uniform": [7, 2, 11, 0, 4, 9, 2, 5, 1, 8, 3, 10, 6, 0, 7],
    "zipf": [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 4, 5],
    "all the same": [3] * 20,
    "some nobody": [-1, 3, -1, -1, 0, 3, 0, -1],
    "all nobody": [-1] * 9,
    "one token": [2],
    "one of many": [-1] * 8 + [5] + [-1] * 3,
}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def add(y: torch.Tensor, z: torch.Tensor, b_t: list[torch.Tensor], choices: list[int]) -> None:
    """As the routed Linear does, either way."""
    if routed_linear.compiled is None:
        add_adapters(y, z, b_t, Groups.of(choices, y.device))
    else:
        add_rows(y, z, np.array([b.data_ptr() for b in b_t]), torch.tensor(choices))


@pytest.fixture(autouse=True)
def no_step_left_behind() -> Iterator[None]:
    yield
    with pytest.raises(StepMissing):
        get_context()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 32])
@pytest.mark.parametrize("choices", POPULARITY.values(), ids=POPULARITY.keys())
def test_the_output_is_the_reference_output(choices: list[int], rank: int, dtype: torch.dtype) -> None:
    plan = toy_plan([("only", 40, 56)], rank=rank)
    adapters = [toy_adapter(plan, seed).modules["only"] for seed in range(12)]
    b_t = [(part.q.double() @ part.r.double()).T.float().contiguous() for part in adapters]
    generator = torch.Generator().manual_seed(rank)
    x, weight = torch.randn(len(choices), 40, generator=generator), torch.randn(56, 40, generator=generator)
    a = shared_a(plan)["only"]
    y = (x @ weight.T).to(dtype)
    before = y.clone()
    add(y, x @ a.T, b_t, choices)
    expected = reference_output(x, weight, None, a, [(part.q, part.r) for part in adapters], choices)
    # One rounding of W x to y's dtype and one of the sum; the adapter's own share is exact to fp32.
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    nobody = torch.tensor(choices) < 0
    assert torch.equal(bits(y[nobody]), bits(before[nobody]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, 16, 32])
@pytest.mark.parametrize("outputs", [56, 192, 1536])
def test_a_tokens_output_does_not_depend_on_who_shares_its_adapter(outputs: int, rank: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    b_t = [torch.randn(rank, outputs, generator=generator) for _ in range(3)]
    y, z = torch.randn(64, outputs, generator=generator).to(dtype), torch.randn(64, rank, generator=generator)
    everyone = y.clone()
    add(everyone, z, b_t, [1] * 64)
    for others in (0, 1, -1):
        for count in (1, 2, 3, 5, 8, 17, 33, 63):
            crowd = y.clone()
            add(crowd, z, b_t, [1] * count + [others] * (64 - count))
            assert torch.equal(bits(crowd[:count]), bits(everyone[:count]))


def test_a_negative_zero_that_no_adapter_touches_keeps_its_sign() -> None:
    y = torch.tensor([[-0.0, 1.0], [-0.0, 1.0]])
    add(y, torch.zeros(2, 1), [torch.zeros(1, 2)], [-1, 0])
    assert torch.signbit(y[0, 0])


def silo_counts(step: StepContext) -> list[dict[str, int]]:
    """Per segment: silo id -> (token, module) choices; silos that shaped nothing are left out."""
    counts, out, start = step.choice_counts(range(step.tokens)), [], 0
    for segment in step.segments:
        total = counts[start : start + segment.length].sum(0).tolist()
        out.append({silo: total[column] for column, silo in enumerate(step.library.silos) if total[column]})
        start += segment.length
    return out


def chat(
    model: ToyModel,
    library: Library,
    mode: str,
    permitted: list[str],
    lengths: tuple[int, ...],
    swap: Library | None = None,
) -> tuple[list[torch.Tensor], list[dict[str, int]]]:
    """One user's sequence in steps of ``lengths`` tokens: outputs and silo counts; ``swap`` comes after the first."""
    rows = PermissionRows(library)
    state = EvidenceState(len(PLAN.modules), 2, library.columns, library.width)
    x = torch.randn(sum(lengths), 24, generator=torch.Generator().manual_seed(4)).to(next(model.parameters()).dtype)
    outputs, counts, position = [], [], 0
    for length in lengths:
        if swap is not None and position:
            rows = PermissionRows(swap)
            state.remap(swap.columns, swap.width)
        slot = 0 if mode == "evidence" else -1
        step = StepContext(rows, [Segment(rows.row_for(permitted), position, length, slot, mode)], state)
        with running(step), torch.inference_mode():
            outputs.append(model(x[position : position + length]))
        counts += silo_counts(step)
        position += length
    return outputs, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["evidence", "per_token"])
class TestNonInterference:
    """For a given user, nothing differs whether a forbidden silo exists, is absent, is being swapped, or holds NaNs."""

    LENGTHS = (7, 1, 1, 4, 1)

    def expect(self, mode: str, dtype: torch.dtype, *libraries: Library) -> None:
        model = ToyModel(PLAN, dtype)
        adapt_model(model, PLAN, A)
        plain = chat(model, toy_library(PLAN, ["b", "d"]), mode, ["b", "d"], self.LENGTHS)
        with base_only(), torch.inference_mode():
            assert not torch.equal(model(torch.zeros(1, 24).to(dtype)), plain[0][1])
        got = chat(model, libraries[0], mode, ["b", "d"], self.LENGTHS, *libraries[1:])
        assert got[1] == plain[1]
        assert all(torch.equal(bits(x), bits(y)) for x, y in zip(got[0], plain[0], strict=True))

    @pytest.mark.parametrize("others", [["a"], ["c"], ["a", "c", "e"], [f"a{i:02}" for i in range(80)]], ids=len)
    def test_with_forbidden_silos_before_between_and_after(
        self, mode: str, dtype: torch.dtype, others: list[str]
    ) -> None:
        self.expect(mode, dtype, toy_library(PLAN, ["b", "d", *others]))

    @pytest.mark.parametrize("part", ["q", "r", "mu", "sigma"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_with_a_forbidden_silo_that_holds_no_numbers(
        self, mode: str, dtype: torch.dtype, part: str, value: float
    ) -> None:
        self.expect(mode, dtype, toy_library(PLAN, ["b", "d"]).add("a", 1, broken(toy_adapter(PLAN, 5), part, value)))

    def test_while_a_forbidden_silo_comes_goes_or_changes(self, mode: str, dtype: torch.dtype) -> None:
        two, three = toy_library(PLAN, ["b", "d"]), toy_library(PLAN, ["a", "b", "d"])
        self.expect(mode, dtype, two, three)
        self.expect(mode, dtype, three, two)
        self.expect(mode, dtype, three, three.replace("a", 2, toy_adapter(PLAN, 6)))


@pytest.mark.parametrize("mode", ["evidence", "per_token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_user_of_nothing_gets_the_base_model_bit_for_bit(mode: str, dtype: torch.dtype) -> None:
    model = ToyModel(PLAN, dtype)
    bare = copy.deepcopy(model)
    adapt_model(model, PLAN, A)
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    for library, permitted in ((toy_library(PLAN, ["a"]), []), (Library.empty(PLAN), ["a"])):
        rows = PermissionRows(library)
        state = EvidenceState(len(PLAN.modules), 2, library.columns, library.width)
        both = [Segment(rows.row_for(permitted), 0, 4, 0, mode), Segment(0, 0, 3, 1, mode)]
        with running(StepContext(rows, both, state, tokens=9)) as step, torch.inference_mode():
            assert torch.equal(bits(model(x)), bits(bare(x)))
        assert silo_counts(step) == [{}, {}]


def test_calling_the_base_only_takes_no_step_and_no_adapter() -> None:
    model = ToyModel(PLAN)
    bare = copy.deepcopy(model)
    adapt_model(model, PLAN, A)
    x = torch.randn(3, 24)
    with base_only(), torch.inference_mode():
        assert torch.equal(model(x), bare(x))


def test_evidence_of_a_user_of_nothing_does_not_depend_on_who_else_is_in_the_batch() -> None:
    """Alone, nobody may be shaped at all, and the layer could skip the routing; a later grant would then be routed
    on less than it would after the same tokens in company."""
    library = toy_library(PLAN, ["a", "b"])
    layer = adapt_model(ToyModel(PLAN), PLAN, A)["first"]
    rows = PermissionRows(library)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(5))
    sums = []
    for company in ([], [Segment(rows.row_for("ab"), 0, 5, 1)]):
        state = EvidenceState(len(PLAN.modules), 2, library.columns, library.width)
        segments = [Segment(0, 0, 5, 0), *company]
        with running(StepContext(rows, segments, state)), torch.inference_mode():
            layer(torch.cat([x] * len(segments)))
        sums.append(state.sums[0, 0])
    assert bool(sums[0].any())
    assert torch.equal(*sums)


def test_a_pass_that_only_reads_looks_at_none_of_its_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks(*_: object) -> None:
        raise AssertionError("on a GPU this would wait for the device in every layer")

    monkeypatch.setattr(StepContext, "grouped", looks)
    monkeypatch.setattr(routed_linear, "add_rows", looks)
    library = toy_library(PLAN, ["a", "b"])
    model = ToyModel(PLAN)
    adapt_model(model, PLAN, A)
    state = EvidenceState(len(PLAN.modules), 1, library.columns, library.width)
    step = StepContext(PermissionRows(library), [Segment(0, 0, 4, 0, recent=4)], state)
    with running(step), torch.inference_mode():
        model(torch.randn(4, 24))
    assert bool(state.sums.any())


def test_one_batch_gives_each_user_what_each_would_get_alone() -> None:
    library = toy_library(PLAN, ["a", "b", "c"])
    model = ToyModel(PLAN)
    adapt_model(model, PLAN, A)
    sets: list[list[str]] = [["a"], [], ["b", "c"], ["a", "b", "c"]]
    x = torch.randn(20, 24, generator=torch.Generator().manual_seed(2))

    def outputs(picked: list[int]) -> list[torch.Tensor]:
        rows = PermissionRows(library)
        state = EvidenceState(len(PLAN.modules), 4, library.columns, library.width)
        segments = [Segment(rows.row_for(sets[i]), 0, 5, i) for i in picked]
        with running(StepContext(rows, segments, state)), torch.inference_mode():
            return list(model(torch.cat([x[5 * i : 5 * i + 5] for i in picked])).split(5))

    for i, together in enumerate(outputs([0, 1, 2, 3])):
        torch.testing.assert_close(together, outputs([i])[0], rtol=1e-5, atol=1e-6)


def test_attribution_counts_every_choice_once() -> None:
    library = toy_library(PLAN, ["a", "b", "c"])
    model = ToyModel(PLAN)
    adapt_model(model, PLAN, A)
    rows = PermissionRows(library)
    segments = [
        Segment(rows.row_for(["a", "c"]), 0, 6, mode="per_token"),
        Segment(0, 0, 2, mode="per_token"),
        Segment(rows.row_for(["b"]), 3, 1, mode="per_token"),
    ]
    with running(StepContext(rows, segments, tokens=10)) as step, torch.inference_mode():
        model(torch.randn(10, 24))
    first, nobody, third = silo_counts(step)
    assert set(first) <= {"a", "c"}
    assert sum(first.values()) == 6 * len(PLAN.modules)
    assert nobody == {}
    assert third == {"b": len(PLAN.modules)}
    assert int(step.choice_counts(range(10)).sum()) == 7 * len(PLAN.modules)


class TestItFailsClosed:
    @pytest.fixture
    def layer(self) -> RoutedLinear:
        return adapt_model(ToyModel(PLAN), PLAN, A)["first"]

    def test_a_layer_without_a_step_refuses_to_run(self, layer: RoutedLinear) -> None:
        with pytest.raises(StepMissing, match="set one before") as refusal:
            layer(torch.zeros(1, 24))
        assert refusal.value.code == "step_missing"

    @pytest.mark.parametrize("tokens", [1, 4])
    def test_a_step_for_another_number_of_tokens_is_refused(self, layer: RoutedLinear, tokens: int) -> None:
        rows = PermissionRows(toy_library(PLAN, ["a"]))
        with (
            pytest.raises(StepMismatch, match=f"describes 3 tokens, but the layer was given {tokens}"),
            running(StepContext(rows, [Segment(0, 0, 3, mode="per_token")])),
        ):
            layer(torch.zeros(tokens, 24))

    def test_a_step_serves_one_forward_pass_only(self, layer: RoutedLinear) -> None:
        rows = PermissionRows(toy_library(PLAN, ["a"]))
        step = StepContext(rows, [Segment(rows.row_for(["a"]), 0, 3, mode="per_token")])
        with running(step):
            layer(torch.zeros(3, 24))
        set_context(step)
        with pytest.raises(StepMismatch, match="its own step"):
            layer(torch.zeros(3, 24))
        reset_context()

    def test_a_failing_pass_leaves_no_step_behind(self, layer: RoutedLinear) -> None:
        rows = PermissionRows(toy_library(PLAN, ["a"]))
        with pytest.raises(RuntimeError), running(StepContext(rows, [Segment(0, 0, 3, mode="per_token")])):
            layer(torch.zeros(3, 25))

    @pytest.mark.parametrize(
        ("segments", "tokens"),
        [([], 0), ([Segment(0, 0, 4, mode="per_token")], 3), ([Segment(0, 0, 0, mode="per_token")], 3)],
    )
    def test_an_impossible_batch_is_refused(self, segments: list[Segment], tokens: int) -> None:
        with pytest.raises(StepMismatch):
            StepContext(PermissionRows(Library.empty(PLAN)), segments, tokens=tokens)

    def test_an_unknown_mode_is_refused(self) -> None:
        with pytest.raises(StepMismatch, match="evidence, per_token"):
            StepContext(PermissionRows(Library.empty(PLAN)), [Segment(0, 0, 1, 0, "average")])

    @pytest.mark.parametrize(
        ("module", "message"),
        [
            (("absent", 24, 40), "has no module absent"),
            (("order_", 24, 40), "has no module order_"),
            (("first", 24, 41), "24 to 40 in the base model, and 24 to 41"),
        ],
    )
    def test_a_model_without_the_plans_linears_is_refused_unchanged(
        self, module: tuple[str, int, int], message: str
    ) -> None:
        model, plan = ToyModel(PLAN), toy_plan([("second", 40, 24), module])
        with pytest.raises(ModelMismatch, match=message) as refusal:
            adapt_model(model, plan, shared_a(plan))
        assert refusal.value.code == "model_mismatch"
        assert not any(isinstance(part, RoutedLinear) for part in model.modules())

    def test_a_model_is_not_adapted_twice(self) -> None:
        model = ToyModel(PLAN)
        adapt_model(model, PLAN, A)
        with pytest.raises(ModelMismatch, match="must be a Linear, got RoutedLinear"):
            adapt_model(model, PLAN, A)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_a_layers_choices_are_the_same_in_any_chunking_of_the_same_inputs(data: st.DataObject, seed: int) -> None:
    """From x on: z, scores, sums and choices, with T = 1, 16, 17 and others in one sequence."""
    layer = adapt_model(ToyModel(PLAN), PLAN, A)["first"]
    library = toy_library(PLAN, ["a", "b", "c"])
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(seed))

    def choices(lengths: list[int]) -> list[int]:
        rows = PermissionRows(library)
        state = EvidenceState(len(PLAN.modules), 1, library.columns, library.width)
        chosen, at = [], 0
        for length in lengths:
            step = StepContext(rows, [Segment(rows.row_for("abc"), at, length, 0)], state)
            with running(step), torch.inference_mode():
                layer(x[at : at + length])
            chosen += step.choices[0].tolist()
            at += length
        return chosen

    cuts = sorted(data.draw(st.sets(st.integers(1, 39))))
    lengths = [end - start for start, end in zip([0, *cuts], [*cuts, 40], strict=True)]
    assert choices(lengths) == choices([40])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_decoder_routes_batched_rows_and_forbidden_silos_change_no_logit(
    tiny_model_dir: Path, tiny_plan: Plan, make_adapter: Callable[..., Adapter], dtype: torch.dtype
) -> None:
    model, tokenizer = load_base_model(str(tiny_model_dir), dtype)
    with torch.inference_mode():
        ids = torch.tensor([tokenizer("How far is the moon?")["input_ids"]] * 2)
        bare = model(input_ids=ids).logits
    adapt_model(model, tiny_plan, verify_a(tiny_plan))
    stats = {spec.name: (1.0, 0.5) for spec in tiny_plan.modules}
    one = Library.empty(tiny_plan).add("m", 1, make_adapter(tiny_plan, 1), stats)
    more = one.add("a", 1, make_adapter(tiny_plan, 2), stats)
    logits = []
    for library in (one, more, more.replace("a", 2, broken(make_adapter(tiny_plan, 2), "q"), stats)):
        rows = PermissionRows(library)
        state = EvidenceState(len(tiny_plan.modules), 2, library.columns, library.width)
        width = ids.shape[1]
        step = StepContext(rows, [Segment(rows.row_for("m"), 0, width, 0), Segment(0, 0, width, 1)], state)
        with running(step), torch.inference_mode():
            logits.append(model(input_ids=ids).logits)
        assert silo_counts(step) == [{"m": (width - 1) * len(tiny_plan.modules)}, {}]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[0][1], bare[1])
    assert not torch.equal(logits[0][0], bare[0])
