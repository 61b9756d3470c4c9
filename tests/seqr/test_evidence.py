"""Accumulated evidence belongs to a sequence: however its tokens arrive, and whoever arrives with them."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqr.adapter import Adapter, ModuleAdapter
from seqr.frame import Frame
from seqr.library import Library, PermissionRows
from seqr.routing.evidence import EvidenceStale, EvidenceState
from seqr.routing.reference import reference_choice, reference_evidence, reference_score, reference_score_error
from seqr.routing.scores import scores
from seqr.step import Segment, StepContext, StepMismatch, running
from tests.seqr.strategies import broken, toy_adapter, toy_library, toy_plan

pytestmark = pytest.mark.usefixtures("either_way")
PLAN = toy_plan()
MODULES = len(PLAN.modules)
LIBRARY = toy_library(PLAN, ["a", "b", "c", "d"])
SILOS = frozenset(LIBRARY.silos)


def state_for(library: Library, slots: int = 8) -> EvidenceState:
    return EvidenceState(MODULES, slots, library.columns, library.width)


def some_z(tokens: int, seed: int) -> torch.Tensor:
    """z of every module for one sequence: [modules, tokens, rank]."""
    return torch.randn(MODULES, tokens, PLAN.rank, generator=torch.Generator().manual_seed(seed))


def run(
    rows: PermissionRows, state: EvidenceState, segments: list[Segment], zs: list[torch.Tensor], padding: int = 0
) -> list[list[list[int]]]:
    """One step over ``segments``, whose tokens have ``zs``; the choices per segment, [tokens][modules]."""
    step = StepContext(rows, segments, state, tokens=sum(s.length for s in segments) + padding)
    z = torch.cat([*zs, torch.randn(MODULES, padding, PLAN.rank)], dim=1)
    with running(step):
        choices = torch.stack([step.choose(module, z[module]) for module in range(MODULES)], dim=1)
    assert bool((choices[step.tokens - padding :] == -1).all())
    return [part.tolist() for part in choices[: step.tokens - padding].split([s.length for s in segments])]


def in_one(
    library: Library, z: torch.Tensor, permitted: frozenset[str] = SILOS
) -> tuple[list[list[int]], torch.Tensor]:
    """The choices and the final sums of a sequence that is prefilled alone in one step."""
    rows, state = PermissionRows(library), state_for(library)
    choices = run(rows, state, [Segment(rows.row_for(permitted), 0, z.shape[1], 0)], [z])[0]
    return choices, state.sums[:, 0]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4), seed=st.integers(0, 2**20))
def test_any_chunking_in_any_company_gives_the_bits_of_one_prefill(
    data: st.DataObject, lengths: list[int], seed: int
) -> None:
    """Prefill, chunked prefill and decode, mixed in one ragged batch with padding."""
    zs = [some_z(length, seed + i) for i, length in enumerate(lengths)]
    sets = [data.draw(st.frozensets(st.sampled_from(sorted(SILOS)))) for _ in lengths]
    slots = data.draw(st.permutations(range(8)))
    rows, state = PermissionRows(LIBRARY), state_for(LIBRARY)
    done = [0] * len(lengths)
    got: list[list[list[int]]] = [[] for _ in lengths]
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        waiting = [i for i, length in enumerate(lengths) if done[i] < length]
        chosen = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True))
        takes = [data.draw(st.sampled_from([1, 1, 2, 5, 20])) for _ in chosen]
        segments, parts = [], []
        for i, take in zip(chosen, takes, strict=True):
            length = min(take, lengths[i] - done[i])
            segments.append(Segment(rows.row_for(sets[i]), done[i], length, slots[i]))
            parts.append(zs[i][:, done[i] : done[i] + length])
        for i, choices in zip(chosen, run(rows, state, segments, parts, data.draw(st.integers(0, 3))), strict=True):
            got[i] += choices
            done[i] += len(choices)
    for i, z in enumerate(zs):
        choices, sums = in_one(LIBRARY, z, sets[i])
        assert got[i] == choices
        assert torch.equal(state.sums[:, slots[i]], sums)
    assert not bool(state.sums[:, -1].any())


@pytest.mark.parametrize("cuts", [[1] * 24, [24], [23, 1], [5, 1, 1, 17], [12, 12]])
def test_scores_of_very_different_size_add_up_to_the_same_bits_in_any_order(cuts: list[int]) -> None:
    """Scores from 1e-12 to the clip, whose plain fp64 sum would depend on the order."""
    library = Library.empty(PLAN)
    for i, silo in enumerate(sorted(SILOS)):
        parts = toy_adapter(PLAN, i).modules.items()
        library = library.add(silo, 1, Adapter({name: ModuleAdapter(p.q, p.r, 0.0, 1.0) for name, p in parts}))
    sizes = 10.0 ** (torch.rand(24, generator=torch.Generator().manual_seed(0)) * 13 - 12)
    z = some_z(24, 16) * sizes[:, None]
    rows, state, choices, at = PermissionRows(library), state_for(library), [], 0
    for length in cuts:
        choices += run(rows, state, [Segment(rows.row_for(SILOS), at, length, 0)], [z[:, at : at + length]])[0]
        at += length
    expected, sums = in_one(library, z)
    assert choices == expected
    assert torch.equal(state.sums[:, 0], sums)
    assert torch.equal(sums, sums.round())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    tokens=st.integers(1, 12),
    condition=st.sampled_from([2.0, 1e3, 1e8]),
    permitted=st.frozensets(st.sampled_from(sorted(SILOS)), min_size=1),
)
def test_choices_equal_the_fp64_reference_of_the_whole_sequence(
    seed: int, tokens: int, condition: float, permitted: frozenset[str]
) -> None:
    """Except where two values are closer than the fp32 bounds of the scores they add up (and the 2^-20 grid)."""
    adapters = {silo: toy_adapter(PLAN, seed + i, condition) for i, silo in enumerate(sorted(SILOS))}
    library = Library.empty(PLAN)
    for silo, adapter in adapters.items():
        library = library.add(silo, 1, adapter)
    z = some_z(tokens, seed) / PLAN.rank
    choices, _ = in_one(library, z, permitted)
    table, slack, worst = [], [], 0.0
    for module, spec in enumerate(PLAN.modules):
        parts = [adapter.modules[spec.name] for adapter in adapters.values()]
        table.append([[reference_score(p.r, p.mu, p.sigma, token) for p in parts] for token in z[module]])
        worst += 2.0**-20 + max(reference_score_error(p.r, p.mu, p.sigma, token) for p in parts for token in z[module])
        slack.append(worst)
    values = reference_evidence(table)
    allowed = [silo in permitted for silo in adapters]
    for t in range(tokens):
        for module in range(MODULES):
            row, choice = values[module][t], choices[t][module]
            best = reference_choice(row, allowed)
            assert choice == best or (allowed[choice] and row[best] - row[choice] <= 2 * slack[module])


def test_position_0_gathers_nothing_and_is_the_base_models() -> None:
    choices, sums = in_one(LIBRARY, some_z(1, 0) * 100.0, frozenset({"b", "d"}))
    assert choices == [[-1] * MODULES]
    assert not bool(sums.any())


def test_what_position_0_held_changes_no_later_choice() -> None:
    z = some_z(9, 1)
    louder = z.clone()
    louder[:, 0] *= 1e4
    assert in_one(LIBRARY, z)[0] == in_one(LIBRARY, louder)[0]


def test_evidence_is_clipped_so_that_one_loud_token_does_not_decide_for_good() -> None:
    z = some_z(5, 2)
    z[:, 1] *= 1e6
    _, sums = in_one(LIBRARY, z[:, :2])
    assert float(sums.max()) == 6.0 * 2**20


def test_a_sequence_settles_on_the_adapter_its_tokens_speak_for() -> None:
    """Tokens that each excite one adapter a little more: token by token the others win some, together they do not."""
    module = LIBRARY.stacks[0]
    z = some_z(60, 3)
    lead = scores(z[0], module.gram, module.offset)[:, :4]
    others = torch.cat([lead[:, :2], lead[:, 3:]], dim=1).amax(1)
    keep = (lead[:, 2] > others - 0.5).nonzero().flatten()[:14]
    favoured = torch.cat([z[:, :1], z[:, keep]], dim=1)
    assert bool((lead[keep, 2] < others[keep]).any())
    assert in_one(LIBRARY, favoured)[0][-1][0] == 2


def test_the_mean_is_over_all_positions_so_far() -> None:
    z = some_z(4, 4)
    _, sums = in_one(LIBRARY, z)
    expected = [
        sum(max(-6.0, min(6.0, reference_score(p.r, p.mu, p.sigma, token))) for token in z[0, 1:])
        for p in (toy_adapter(PLAN, sum(silo.encode()) * 7919).modules["first"] for silo in LIBRARY.silos)
    ]
    assert (sums[0, :4] / 2**20).tolist() == pytest.approx(expected, abs=1e-4)


def test_a_silo_that_joins_begins_at_zero_and_the_others_keep_what_they_have() -> None:
    rows, state = PermissionRows(LIBRARY), state_for(LIBRARY)
    z = some_z(8, 5)
    run(rows, state, [Segment(rows.row_for(SILOS), 0, 5, 3)], [z[:, :5]])
    before = state.sums[:, 3].clone()
    grown = LIBRARY.add("aa", 1, toy_adapter(PLAN, 77))
    state.remap(grown.columns, grown.width)
    moved = [grown.silos.index(silo) for silo in LIBRARY.silos]
    assert torch.equal(state.sums[:, 3][:, moved], before[:, :4])
    assert not bool(state.sums[:, 3, grown.silos.index("aa")].any())
    rows = PermissionRows(grown)
    choices = run(rows, state, [Segment(rows.row_for(SILOS), 5, 3, 3)], [z[:, 5:]])[0]
    silos = [[grown.silos[c] for c in token] for token in choices]
    assert silos == [[LIBRARY.silos[c] for c in token] for token in in_one(LIBRARY, z)[0][5:]]


def test_a_silo_that_leaves_takes_its_evidence_with_it() -> None:
    rows, state = PermissionRows(LIBRARY), state_for(LIBRARY)
    z = some_z(8, 6)
    run(rows, state, [Segment(rows.row_for(SILOS), 0, 5, 0)], [z[:, :5]])
    old = state.sums
    without = LIBRARY.remove("b")
    state.remap(without.columns, without.width)
    rows = PermissionRows(without)
    assert not bool(old.any())
    assert not bool(state.sums[:, 0, 3:].any())
    choices = run(rows, state, [Segment(rows.row_for(SILOS), 5, 3, 0)], [z[:, 5:]])[0]
    expected = in_one(LIBRARY, z, SILOS - {"b"})[0][5:]
    assert [[without.silos[c] for c in t] for t in choices] == [[LIBRARY.silos[c] for c in t] for t in expected]


def test_a_new_revision_begins_at_zero() -> None:
    rows, state = PermissionRows(LIBRARY), state_for(LIBRARY)
    run(rows, state, [Segment(rows.row_for(SILOS), 0, 5, 0)], [some_z(5, 7)])
    retrained = LIBRARY.replace("c", 2, toy_adapter(PLAN, 78))
    state.remap(retrained.columns, retrained.width)
    assert not bool(state.sums[:, 0, retrained.silos.index("c")].any())
    assert bool(state.sums[:, 0, retrained.silos.index("d")].any())


def test_the_library_may_grow_past_a_block_and_shrink_again() -> None:
    rows, state = PermissionRows(LIBRARY), state_for(LIBRARY)
    run(rows, state, [Segment(rows.row_for(SILOS), 0, 5, 0)], [some_z(5, 8)])
    before = state.sums.clone()
    columns = tuple(sorted([*LIBRARY.columns, *((f"x{i:03}", 1) for i in range(70))]))
    state.remap(columns, 128)
    assert state.sums.shape[2] == 128
    state.remap(LIBRARY.columns, LIBRARY.width)
    assert torch.equal(state.sums, before)


@pytest.mark.parametrize("part", ["q", "r", "mu", "sigma"])
def test_a_nan_in_one_adapter_changes_no_bit_of_the_others_and_is_never_chosen(part: str) -> None:
    z = some_z(9, 9)
    poisoned = LIBRARY.remove("b").add("b", 2, broken(toy_adapter(PLAN, 1), part))
    for permitted in (SILOS, SILOS - {"b"}):
        choices, sums = in_one(poisoned, z, permitted)
        expected, clean = in_one(LIBRARY, z, SILOS - {"b"})
        assert choices == expected
        others = [LIBRARY.silos.index(silo) for silo in "acd"]
        assert torch.equal(sums[:, others], clean[:, others])
    assert in_one(poisoned, z, frozenset("b"))[0] == [[-1] * MODULES] * 9


def test_one_token_that_overflows_costs_that_token_and_not_the_sequence() -> None:
    z = some_z(6, 10)
    z[1, 3] = math.inf
    choices, sums = in_one(LIBRARY, z)
    assert choices[3][1] == -1
    assert all(
        choice >= 0 for t, token in enumerate(choices[1:], 1) for m, choice in enumerate(token) if (t, m) != (3, 1)
    )
    assert bool(torch.isfinite(sums).all())


def test_a_freed_slot_remembers_nothing() -> None:
    rows, state = PermissionRows(LIBRARY), state_for(LIBRARY)
    row = rows.row_for(SILOS)
    run(rows, state, [Segment(row, 0, 6, 2)], [some_z(6, 11)])
    state.free(2)
    assert not bool(state.sums.any())
    z = some_z(4, 12)
    assert run(rows, state, [Segment(row, 0, 4, 2)], [z])[0] == in_one(LIBRARY, z)[0]


def test_position_0_in_a_used_slot_begins_a_new_sequence() -> None:
    rows, state = PermissionRows(LIBRARY), state_for(LIBRARY)
    row = rows.row_for(SILOS)
    run(rows, state, [Segment(row, 0, 6, 2)], [some_z(6, 11)])
    z = some_z(4, 12)
    assert run(rows, state, [Segment(row, 0, 4, 2)], [z])[0] == in_one(LIBRARY, z)[0]


def test_a_sequence_that_nobody_may_shape_still_gathers_so_that_a_later_grant_finds_it() -> None:
    z = some_z(8, 13)
    rows, state = PermissionRows(LIBRARY), state_for(LIBRARY)
    assert run(rows, state, [Segment(0, 0, 5, 0)], [z[:, :5]])[0] == [[-1] * MODULES] * 5
    later = run(rows, state, [Segment(rows.row_for(SILOS), 5, 3, 0)], [z[:, 5:]])[0]
    assert later == in_one(LIBRARY, z)[0][5:]


def test_both_modes_share_a_batch_and_neither_changes_the_other() -> None:
    z, other = some_z(6, 14), some_z(5, 15)
    rows, state = PermissionRows(LIBRARY), state_for(LIBRARY)
    row = rows.row_for(SILOS)
    mixed = run(rows, state, [Segment(row, 0, 5, mode="per_token"), Segment(row, 0, 6, 4)], [other, z], padding=2)
    alone = run(rows, state_for(LIBRARY), [Segment(row, 0, 5, mode="per_token")], [other])
    assert mixed == [alone[0], in_one(LIBRARY, z)[0]]
    assert not bool(state.sums[:, -1].any())


class TestStepsThatDoNotContinueTheirSequences:
    def step(self, state: EvidenceState, *segments: Segment, library: Library = LIBRARY) -> StepContext:
        return StepContext(PermissionRows(library), list(segments), state)

    def test_a_gap_in_positions_is_refused(self) -> None:
        state = state_for(LIBRARY)
        self.step(state, Segment(0, 0, 3, 1)).finish()
        with pytest.raises(EvidenceStale, match="positions below 3, but the step begins at 4") as refusal:
            self.step(state, Segment(0, 4, 1, 1))
        assert refusal.value.code == "evidence_stale"

    def test_a_repeated_position_is_refused(self) -> None:
        state = state_for(LIBRARY)
        self.step(state, Segment(0, 0, 3, 1)).finish()
        with pytest.raises(EvidenceStale, match="begins at 2"):
            self.step(state, Segment(0, 2, 1, 1))

    def test_going_on_after_a_failed_forward_pass_is_refused(self) -> None:
        state = state_for(LIBRARY)
        with pytest.raises(RuntimeError), running(self.step(state, Segment(0, 0, 3, 1))):
            raise RuntimeError
        with pytest.raises(EvidenceStale, match="never finished"):
            self.step(state, Segment(0, 3, 1, 1))
        self.step(state, Segment(0, 0, 3, 1))

    def test_a_refused_step_leaves_every_sequence_as_it_was(self) -> None:
        state = state_for(LIBRARY)
        self.step(state, Segment(0, 0, 3, 1)).finish()
        with pytest.raises(EvidenceStale):
            self.step(state, Segment(0, 3, 1, 1), Segment(0, 7, 1, 2))
        self.step(state, Segment(0, 3, 1, 1))

    @pytest.mark.parametrize("slot", [-1, 8])
    def test_a_slot_that_does_not_exist_is_refused(self, slot: int) -> None:
        with pytest.raises(EvidenceStale, match="slots 0 to 7"):
            self.step(state_for(LIBRARY), Segment(0, 0, 1, slot))

    def test_two_segments_in_one_slot_are_refused(self) -> None:
        with pytest.raises(StepMismatch, match="share an evidence slot"):
            self.step(state_for(LIBRARY), Segment(0, 0, 1, 3), Segment(0, 0, 1, 3))

    def test_evidence_of_another_library_is_refused(self) -> None:
        with pytest.raises(StepMismatch, match="remap"):
            self.step(state_for(LIBRARY), Segment(0, 0, 1, 3), library=LIBRARY.remove("a"))

    def test_evidence_without_a_state_is_refused(self) -> None:
        with pytest.raises(StepMismatch, match="needs an evidence state"):
            StepContext(PermissionRows(LIBRARY), [Segment(0, 0, 1, 3)])


def test_a_common_frame_is_no_evidence_however_it_is_chunked() -> None:
    """In the frame nobody is chosen, whatever the chunks."""
    plan = toy_plan()
    library = toy_library(plan, ("a", "b", "c"))
    z = torch.randn(12, plan.rank, generator=torch.Generator().manual_seed(5))

    def choices(cuts: list[int], frame: int) -> list[int]:
        rows = PermissionRows(library)
        row = rows.row_for(frozenset(library.silos))
        state = EvidenceState(len(plan.modules), 1, library.columns, library.width)
        found: list[int] = []
        for start, end in pairwise([0, *cuts, 12]):
            step = StepContext(rows, [Segment(row, start, end - start, 0, "evidence", Frame(frame))], state)
            with running(step):
                found += step.choose(0, z[start:end]).tolist()
        return found

    whole = choices([], 7)
    assert whole[:7] == [-1] * 7 and -1 not in whole[7:]
    assert choices([3, 7, 8], 7) == whole == choices(list(range(1, 12)), 7)
    assert choices([], 1) != whole
