"""Modules that read the same x are routed together, and each gets what it would get alone."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from seqr.library import Library, PermissionRows
from seqr.routed_linear import ModelMismatch, adapt_model, find_sites, join_sites
from seqr.routing.evidence import EvidenceState, Standing
from seqr.step import MODES, Segment, StepContext, StepMismatch, reset_context, running, set_context
from tests.seqr.strategies import shared_a, toy_library, toy_plan

pytestmark = pytest.mark.usefixtures("either_way")
PLAN = toy_plan((("q", 24, 24), ("k", 24, 16), ("v", 24, 16), ("o", 24, 24), ("up", 24, 40), ("gate", 24, 40)))
LIBRARY = toy_library(PLAN, ["acme", "bolt", "clinic"])


class Layer(nn.Module):
    """A decoder layer of a sort: q, k and v read one tensor, o another, up and gate a third."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.embedding = nn.Embedding(50, 24)
        for spec in PLAN.modules:
            self.add_module(spec.name, nn.Linear(spec.in_features, spec.out_features))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4.0)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        mixed = self.q(x) + torch.cat([self.k(x), self.v(x)[..., :8]], dim=-1)
        x = self.o(torch.tanh(mixed))
        both: torch.Tensor = self.up(x) * self.gate(x)
        return both


def layer(joined: bool) -> Layer:
    model = Layer()
    adapt_model(model, PLAN, shared_a(PLAN))
    if joined:
        join_sites(model, PLAN)
    return model


def test_the_sites_are_the_modules_that_read_the_same_tensor() -> None:
    assert find_sites(layer(joined=False), PLAN) == ((0, 3), (3, 1), (4, 2))
    assert find_sites(layer(joined=True), PLAN) == ((0, 3), (3, 1), (4, 2))


def test_a_model_that_is_not_adapted_has_no_sites() -> None:
    with pytest.raises(ModelMismatch, match="module q must be adapted first, got Linear"):
        join_sites(Layer(), PLAN)


def test_a_module_that_is_called_twice_is_a_site_of_its_own() -> None:
    class Twice(Layer):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            self.k(self.embedding(input_ids))
            return super().forward(input_ids)

    model = Twice()
    adapt_model(model, PLAN, shared_a(PLAN))
    assert find_sites(model, PLAN)[:3] == ((0, 1), (1, 1), (2, 1))


@pytest.mark.parametrize("watched", [(), (0, 3, 8)])
@pytest.mark.parametrize("modes", [*((mode,) for mode in MODES), MODES], ids="-".join)
def test_a_site_routes_its_modules_as_each_would_be_alone(modes: tuple[str, ...], watched: tuple[int, ...]) -> None:
    standing = Standing({("acme", 1): 5.0, ("bolt", 1): 9.0})
    ids = torch.randint(0, 50, (1, 3 * 4), generator=torch.Generator().manual_seed(2))

    def passed(joined: bool) -> tuple[torch.Tensor, StepContext, torch.Tensor]:
        rows, evidence = PermissionRows(LIBRARY), EvidenceState(6, 4, LIBRARY.columns, LIBRARY.width)
        some = rows.row_for(["acme", "bolt"])
        everybody = rows.row_for(LIBRARY.silos)
        segments = [
            Segment(row, 0, 4, slot, modes[slot % len(modes)], standing=standing)
            for slot, row in enumerate((everybody, some, everybody))
        ]
        with torch.inference_mode(), running(StepContext(rows, segments, evidence, watched=watched)) as step:
            return layer(joined)(ids), step, evidence.sums

    (y, step, sums), (expected, alone, its_sums) = passed(joined=True), passed(joined=False)
    assert len(step.choices) == len(alone.choices) == 6
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(step.choices, alone.choices, strict=True))
    assert any(int(column.max()) >= 0 for column in step.choices)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    # A last bit of z may move a score from one unit of 2^-20 to the next.
    torch.testing.assert_close(sums, its_sums, rtol=0.0, atol=64.0)
    for ours, theirs in zip(step.margins(), alone.margins(), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs is None or ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)


def test_a_part_that_is_given_another_x_is_routed_by_that_x() -> None:
    model, separate = layer(joined=True), layer(joined=False)
    x, other = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    for part in ("q", "k", "v"):
        rows = PermissionRows(LIBRARY)
        both = [StepContext(rows, [Segment(rows.row_for(LIBRARY.silos), 0, 5, mode="per_token")]) for _ in range(2)]
        for step, its in zip(both, (model, separate), strict=True):
            with torch.inference_mode(), running(step):
                y = its.get_submodule(part)(x if part == "q" else other)
                if its is model:
                    ours = y
        torch.testing.assert_close(ours, y, rtol=1e-5, atol=1e-5)


def test_a_site_that_is_called_twice_in_a_step_is_refused() -> None:
    model, x, rows = layer(joined=True), torch.randn(5, 24), PermissionRows(LIBRARY)
    step = StepContext(rows, [Segment(rows.row_for(LIBRARY.silos), 0, 5, mode="per_token")])
    with torch.inference_mode(), running(step):
        model.get_submodule("q")(x)
        with pytest.raises(StepMismatch, match="module 0 was already passed in this step"):
            model.get_submodule("q")(x)


def test_a_pass_that_breaks_off_inside_a_site_keeps_no_library() -> None:
    model = layer(joined=True)
    library: Library | None = copy.copy(LIBRARY)
    assert library is not None
    rows: PermissionRows | None = PermissionRows(library)
    assert rows is not None
    step: StepContext | None = StepContext(rows, [Segment(rows.row_for(library.silos), 0, 5, mode="per_token")])
    gone = weakref.ref(library)
    set_context(step)
    with torch.inference_mode():
        model.get_submodule("q")(torch.randn(5, 24))
    reset_context()
    library = rows = step = None
    gc.collect()
    assert gone() is None
