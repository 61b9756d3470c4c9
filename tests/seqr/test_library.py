"""The library: immutable, in the order of silo ids, and the same bits for a silo whoever else is there."""

import pytest
import torch

from seqr.adapter import Adapter, ModuleAdapter
from seqr.library import (
    AdapterMismatch,
    CalibrationMissing,
    Library,
    PermissionRows,
    SiloAlreadyPresent,
    SiloNotPresent,
)
from seqr.routing.exact import Truth
from tests.seqr.strategies import toy_adapter, toy_library, toy_plan

PLAN = toy_plan()


def snapshot(library: Library) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(stack.gram.clone(), stack.offset.clone()) for stack in library.stacks]


def test_columns_are_sorted_by_the_bytes_of_the_silo_id() -> None:
    library = toy_library(PLAN, ["b", "é", "a", "Z", "a-1"])
    assert library.silos == ("Z", "a", "a-1", "b", "é")
    assert [library.silos.index(silo) for silo in library.silos] == [0, 1, 2, 3, 4]


def test_every_change_is_a_new_library_and_leaves_the_old_one_as_it_was() -> None:
    first = toy_library(PLAN, ["a", "b"])
    before = snapshot(first)
    second = first.add("c", 1, toy_adapter(PLAN, 9))
    third = second.replace("a", 2, toy_adapter(PLAN, 10))
    fourth = third.remove("b")
    assert [one.version for one in (first, second, third, fourth)] == [2, 3, 4, 5]
    assert [one.silos for one in (first, second, third, fourth)] == [
        ("a", "b"),
        ("a", "b", "c"),
        ("a", "b", "c"),
        ("a", "c"),
    ]
    assert (dict(third.columns)["a"], dict(second.columns)["a"]) == (2, 1)
    assert all(
        torch.equal(x, y)
        for old, new in zip(before, snapshot(first), strict=True)
        for x, y in zip(old, new, strict=True)
    )


def test_a_change_copies_no_adapter_of_the_others() -> None:
    first = toy_library(PLAN, ["a", "b"])
    second = first.add("c", 1, toy_adapter(PLAN, 9))
    for old, new in zip(first.stacks, second.stacks, strict=True):
        assert [old.b_t[0].data_ptr(), old.b_t[1].data_ptr()] == [new.b_t[0].data_ptr(), new.b_t[1].data_ptr()]


def test_a_silos_column_has_the_same_bits_whoever_else_is_there() -> None:
    alone, crowd = toy_library(PLAN, ["m"]), toy_library(PLAN, [f"s{i}" for i in range(70)] + ["m", "a"])
    assert crowd.width == 128
    place = crowd.silos.index("m")
    for one, many in zip(alone.stacks, crowd.stacks, strict=True):
        assert torch.equal(one.gram[0, :, 0], many.gram[place // 64, :, place % 64])
        assert torch.equal(one.offset[0], many.offset[place])
        assert torch.equal(one.b_t[0], many.b_t[place])


def test_adding_and_removing_leads_back_to_the_same_bits() -> None:
    library = toy_library(PLAN, ["a", "b"])
    back = library.add("aa", 1, toy_adapter(PLAN, 9)).remove("aa")
    assert back.columns == library.columns
    assert all(
        torch.equal(x, y)
        for old, new in zip(snapshot(library), snapshot(back), strict=True)
        for x, y in zip(old, new, strict=True)
    )


def test_the_stack_holds_the_plans_product_with_the_scale_folded_in() -> None:
    adapter = toy_adapter(PLAN, 3)
    stack = Library.empty(PLAN).add("a", 1, adapter).stacks[1]
    part = adapter.modules["second"]
    torch.testing.assert_close(stack.b_t[0].T, part.q @ part.r, rtol=1e-6, atol=1e-7)
    assert float(stack.offset[0]) == pytest.approx(part.mu / part.sigma)


def test_public_calibration_routes_when_the_plan_says_so_and_own_when_it_says_own() -> None:
    adapter = toy_adapter(PLAN, 3)
    public = {spec.name: (5.0, 2.0) for spec in PLAN.modules}
    for calibration, offset in (("public", 2.5), ("own", adapter.modules["first"].mu / adapter.modules["first"].sigma)):
        library = Library.empty(toy_plan(calibration=calibration)).add("a", 1, adapter, public)
        assert float(library.stacks[0].offset[0]) == pytest.approx(offset)


def test_what_a_silo_reports_cannot_bias_a_publicly_calibrated_library() -> None:
    plan = toy_plan(calibration="public")
    public = {spec.name: (5.0, 2.0) for spec in plan.modules}
    honest = toy_adapter(plan, 3)
    boastful = Adapter({name: ModuleAdapter(m.q, m.r, -1e6, 1e-6) for name, m in honest.modules.items()})
    one, other = (Library.empty(plan).add("a", 1, adapter, public) for adapter in (honest, boastful))
    assert all(
        torch.equal(x, y)
        for a, b in zip(snapshot(one), snapshot(other), strict=True)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("stats", [None, {"first": (0.0, 1.0)}])
def test_public_calibration_that_is_missing_is_refused(stats: dict[str, tuple[float, float]] | None) -> None:
    with pytest.raises(CalibrationMissing, match="recalibrate silo a") as refusal:
        Library.empty(toy_plan(calibration="public")).add("a", 1, toy_adapter(PLAN, 3), stats)
    assert refusal.value.code == "calibration_missing"


def test_a_second_adapter_of_one_silo_is_refused() -> None:
    with pytest.raises(SiloAlreadyPresent, match="silo a already"):
        toy_library(PLAN, ["a"]).add("a", 2, toy_adapter(PLAN, 1))


def test_a_silo_that_is_not_there_can_neither_leave_nor_change() -> None:
    library = toy_library(PLAN, ["a"])
    for act in (
        lambda: library.remove("b"),
        lambda: library.replace("b", 2, toy_adapter(PLAN, 1)),
    ):
        with pytest.raises(SiloNotPresent, match="silo b"):
            act()


def test_an_adapter_of_another_plan_is_refused_by_module_and_shape() -> None:
    library = Library.empty(PLAN)
    with pytest.raises(AdapterMismatch, match="differs in fourth"):
        library.add(
            "a",
            1,
            toy_adapter(toy_plan([("first", 24, 40), ("second", 40, 24), ("third", 24, 16), ("fourth", 4, 4)]), 1),
        )
    with pytest.raises(AdapterMismatch, match="differs in third"):
        library.add("a", 1, toy_adapter(toy_plan([("first", 24, 40), ("second", 40, 24)]), 1))
    with pytest.raises(AdapterMismatch, match=r"\(40, 3\).* wants .*\(40, 4\)"):
        library.add("a", 1, toy_adapter(toy_plan(rank=3), 1))


class TestPermissionRows:
    def test_row_0_is_nobody_and_equal_sets_share_a_row(self) -> None:
        rows = PermissionRows(toy_library(PLAN, ["a", "b", "c"]))
        assert rows.row_for([]) == 0
        assert not bool(rows.table[0].any())
        assert rows.row_for(["a", "c"]) == rows.row_for({"c", "a"}) == 1
        assert rows.row_for(["b"]) == 2
        assert rows.table[:, :4].tolist() == [[False] * 4, [True, False, True, False], [False, True, False, False]]

    def test_padding_columns_are_permitted_to_nobody(self) -> None:
        rows = PermissionRows(toy_library(PLAN, ["a"]))
        rows.row_for(["a", "", "b"])
        assert not bool(rows.table[:, 1:].any())

    def test_a_new_set_costs_one_row_and_not_the_whole_table_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        library = toy_library(PLAN, ["a", "b", "c"])
        asked: list[frozenset[str]] = []
        permission_row = Library.permission_row
        monkeypatch.setattr(
            Library, "permission_row", lambda self, silos: (asked.append(silos), permission_row(self, silos))[1]
        )
        rows = PermissionRows(library)
        sets = [frozenset(silos) for silos in ("", "a", "ab", "abc", "bc")]
        for silos in sets:
            row = rows.row_for(silos)
            assert rows.table[row].equal(permission_row(library, silos))
        assert asked == sets and rows.table.equal(torch.stack([permission_row(library, silos) for silos in sets]))


def test_the_bounds_kept_with_each_adapter_are_those_of_the_whole_stack() -> None:
    """Also for an adapter that cannot be used, and for padding."""
    broken = toy_adapter(PLAN, 11)
    for module in broken.modules.values():
        module.q[0, 0] = float("nan")
    library = toy_library(PLAN, ["a", "b"]).add("c", 1, broken)
    for stack in library.stacks:
        usable = torch.tensor([True, True] + [False] * (library.width - 2))
        whole = Truth.of(stack.truth.r, stack.truth.mu, stack.truth.sigma, usable)
        assert torch.allclose(stack.truth.slope[:3], whole.slope[:3], rtol=1e-12, atol=0.0)
        assert torch.allclose(stack.truth.floor[:3], whole.floor[:3], rtol=1e-12, atol=0.0)
        assert (stack.truth.worst_slope, stack.truth.worst_floor) == pytest.approx(
            (whole.worst_slope, whole.worst_floor), rel=1e-12
        )
