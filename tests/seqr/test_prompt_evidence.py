"""One adapter for a whole answer: the one that the prompt, as the base model reads it, speaks for."""

import pytest
import torch

from seqr.frame import Frame
from seqr.library import Library, PermissionRows
from seqr.routing.evidence import GRID, EvidenceState, Standing
from seqr.routing.reference import reference_choice, reference_score, reference_standing
from seqr.step import Segment, StepContext, StepMismatch, running
from tests.seqr.strategies import broken, toy_adapter, toy_library, toy_plan

pytestmark = pytest.mark.usefixtures("either_way")
PLAN = toy_plan()
MODULES = len(PLAN.modules)
LIBRARY = toy_library(PLAN, ["a", "b", "c", "d"])
SILOS = frozenset(LIBRARY.silos)


def some_z(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(MODULES, tokens, PLAN.rank, generator=torch.Generator().manual_seed(seed))


def scores_of(z: torch.Tensor) -> list[list[list[float]]]:
    """The scores of ``LIBRARY`` by module, token and adapter."""
    adapters = [toy_adapter(PLAN, sum(silo.encode()) * 7919) for silo in LIBRARY.silos]
    return [
        [[reference_score(p.r, p.mu, p.sigma, t) for p in (a.modules[spec.name] for a in adapters)] for t in z[module]]
        for module, spec in enumerate(PLAN.modules)
    ]


def read(z: torch.Tensor, library: Library = LIBRARY, frame: Frame | None = None, cut: int | None = None) -> Standing:
    """What a prompt with these z says, read in one chunk or in two."""
    rows, state = PermissionRows(library), EvidenceState(MODULES, 1, library.columns, library.width)
    recent = frame.tail.start if frame else z.shape[1]
    for start, end in [(0, z.shape[1])] if cut is None else [(0, cut), (cut, z.shape[1])]:
        step = StepContext(rows, [Segment(0, start, end - start, 0, frame=frame or Frame(), recent=recent)], state)
        with running(step):
            for module in range(MODULES):
                assert bool((step.choose(module, z[module, start:end]) == -1).all())
    return state.standing(0, set(library.columns))


def settled(standing: Standing, permitted: frozenset[str], library: Library = LIBRARY) -> list[int]:
    """The distinct choices of an answer of three tokens."""
    rows = PermissionRows(library)
    row = rows.row_for(permitted)
    step = StepContext(rows, [Segment(row, 5, 3, mode="prompt_evidence", standing=standing)])
    z = some_z(3, 98)
    with running(step):
        return sorted({c for module in range(MODULES) for c in step.choose(module, z[module]).tolist()})


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("permitted", [SILOS, frozenset("bd"), frozenset("c"), frozenset()])
def test_the_permitted_silo_with_the_most_evidence_shapes_every_token(seed: int, permitted: frozenset[str]) -> None:
    z = some_z(9, seed)
    expected = reference_choice(reference_standing(scores_of(z)), [silo in permitted for silo in LIBRARY.silos])
    assert settled(read(z), permitted) == [expected]


@pytest.mark.parametrize("tokens", [2, 9, 40, 300])
def test_a_word_counts_half_as_much_as_the_word_six_places_after_it(tokens: int) -> None:
    z = some_z(tokens, 11)
    got = [units / GRID for units in read(z).row(LIBRARY.columns, 4).tolist()]
    assert got == pytest.approx(reference_standing(scores_of(z)), abs=1e-4 * MODULES)


def test_in_a_chat_the_last_word_is_the_one_before_the_frames_end() -> None:
    z = some_z(12, 12)
    assert read(z, frame=Frame(1, range(9, 12))) == read(z[:, :9])


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_a_prompt_read_in_chunks_says_the_same(cut: int) -> None:
    assert read(some_z(9, 1), cut=cut) == read(some_z(9, 1))


@pytest.mark.parametrize("start", [1, 20])
def test_words_that_are_no_evidence_need_not_be_read(start: int) -> None:
    z = some_z(200, 13)
    rows, state = PermissionRows(LIBRARY), EvidenceState(MODULES, 1, LIBRARY.columns, LIBRARY.width)
    state.begin_at(0, start)
    with running(StepContext(rows, [Segment(0, start, 200 - start, 0, recent=200)], state)) as step:
        for module in range(MODULES):
            step.choose(module, z[module, start:])
    assert state.standing(0, set(LIBRARY.columns)) == read(z)


def test_the_frame_of_the_chat_says_nothing() -> None:
    z = some_z(12, 2)
    louder = z.clone()
    louder[:, :4] *= 50.0
    louder[:, 9:] *= 50.0
    frame = Frame(4, range(9, 12))
    assert read(louder, frame=frame) == read(z, frame=frame)
    assert read(louder) != read(z)


def test_a_silo_that_joins_has_no_evidence_and_one_that_leaves_takes_its_own_along() -> None:
    standing = read(some_z(9, 3))
    first = settled(standing, SILOS)[0]
    without = LIBRARY.remove(LIBRARY.silos[first])
    values = dict(zip(LIBRARY.silos, standing.row(LIBRARY.columns, 4).tolist(), strict=True))
    second = max(sorted(SILOS - {LIBRARY.silos[first]}), key=lambda silo: values[silo])
    assert [without.silos[c] for c in settled(standing, SILOS, without)] == [second]
    grown = LIBRARY.add("aa", 1, toy_adapter(PLAN, 77))
    assert standing.row(grown.columns, grown.width)[grown.silos.index("aa")] == 0.0


def test_what_a_sequence_may_not_use_leaves_no_evidence_in_it() -> None:
    library = LIBRARY
    state = EvidenceState(MODULES, 1, library.columns, library.width)
    z = some_z(9, 8)
    with running(StepContext(PermissionRows(library), [Segment(0, 0, 9, 0)], state)) as step:
        for module in range(MODULES):
            step.choose(module, z[module])
    assert set(state.standing(0, {("b", 1), ("x", 1)}).units) == {("b", 1)}


def test_a_new_revision_does_not_inherit_the_evidence_of_the_old_one() -> None:
    standing = read(some_z(9, 4))
    retrained = LIBRARY.replace("c", 2, toy_adapter(PLAN, 78))
    assert standing.row(retrained.columns, 64)[retrained.silos.index("c")] == 0.0


def test_without_any_evidence_the_lowest_permitted_silo_answers() -> None:
    assert settled(Standing({}), frozenset("bd")) == [LIBRARY.silos.index("b")]


@pytest.mark.parametrize("part", ["q", "r", "mu", "sigma"])
def test_an_adapter_that_is_not_finite_never_shapes_an_answer(part: str) -> None:
    poisoned = LIBRARY.replace("b", 2, broken(toy_adapter(PLAN, 1), part))
    z = some_z(9, 5)
    standing = read(z, poisoned)
    assert settled(standing, frozenset("b"), poisoned) == [-1]
    assert settled(standing, SILOS, poisoned) == settled(read(z), SILOS - {"b"})


def test_the_three_modes_share_a_batch_and_none_changes_another() -> None:
    rows = PermissionRows(LIBRARY)
    row = rows.row_for(SILOS)
    standing = read(some_z(9, 6))
    kinds = [
        Segment(row, 5, 3, mode="prompt_evidence", standing=standing),
        Segment(row, 0, 4, 0),
        Segment(row, 7, 2, mode="per_token"),
    ]

    def run(which: list[int], z: torch.Tensor, padding: int = 0) -> list[list[list[int]]]:
        state = EvidenceState(MODULES, 1, LIBRARY.columns, LIBRARY.width)
        segments = [kinds[i] for i in which]
        step = StepContext(rows, segments, state, sum(s.length for s in segments) + padding)
        z = torch.cat([z, torch.zeros(MODULES, padding, PLAN.rank)], dim=1)
        with running(step):
            found = torch.stack([step.choose(module, z[module]) for module in range(MODULES)], dim=1)
        assert bool((found[step.tokens - padding :] == -1).all())
        return [part.tolist() for part in found[: step.tokens - padding].split([s.length for s in segments])]

    z = some_z(9, 7)
    parts = [z[:, :3], z[:, 3:7], z[:, 7:]]
    alone = [run([i], part)[0] for i, part in enumerate(parts)]
    assert run([0, 1, 2], z, padding=2) == alone
    assert run([0, 2], torch.cat([parts[0], parts[2]], dim=1)) == [alone[0], alone[2]]
    assert run([0, 1], torch.cat(parts[:2], dim=1)) == alone[:2]


def test_an_answer_without_its_prompts_evidence_is_refused() -> None:
    with pytest.raises(StepMismatch, match="needs what the prompt has said"):
        StepContext(PermissionRows(LIBRARY), [Segment(0, 5, 3, mode="prompt_evidence")])
