"""`seqr bench routing` measures what it says: equal choices, honest bytes, no wrong token, a sentence per refusal."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from seqr.bench.routing import command
from seqr.bench.routing.__main__ import app
from seqr.bench.routing.adapters import Shelf, random_shelf, vech
from seqr.bench.routing.adversary import assorted
from seqr.bench.routing.command import BenchRefused, check_options
from seqr.bench.routing.exactness import check, kinds, run_exactness
from seqr.bench.routing.grid import Result, cells, run_cell, run_grid
from seqr.bench.routing.layer import DEPTH, bench_library, run_layers
from seqr.bench.routing.memory import (
    BUDGETS,
    LLAMA_8B,
    PLACEMENTS,
    adapter_bytes,
    fixed_bytes,
    largest_library,
    library_bytes,
    measured_bytes,
    run_memory,
)
from seqr.bench.routing.methods import METHODS, Cell, flops, prepare, weight_bytes
from seqr.bench.routing.report import to_markdown
from seqr.bench.routing.searching import run_search
from seqr.bench.routing.timing import interleave, peak_bytes
from seqr.library import Library
from seqr.routing.features import gram
from tests.seqr.strategies import toy_adapter, toy_plan


def quiet(line: str) -> None:
    """Says nothing."""


def prepared(cell: Cell, permitted: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    shelf = random_shelf(cell.adapters, cell.rank)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(cell.rank, cell.width, generator=generator) / cell.width**0.5
    x = torch.randn(cell.tokens, cell.width, generator=generator)
    allowed = shelf.everyone(cell.tokens) if permitted is None else permitted
    return {name: prepare(name, cell, shelf, a, x, allowed).run() for name in METHODS}


@pytest.mark.parametrize("cell", [Cell(10, 8, 48, 1), Cell(100, 4, 40, 17), Cell(64, 16, 64, 33)], ids=str)
def test_all_norm_maximising_methods_make_the_same_choices(cell: Cell) -> None:
    choices = prepared(cell)
    for name in ("naive", "spectr", "paper", "paper, rearranged", "ours"):
        assert torch.equal(choices[name], choices["ours, exact"]), name
    assert not torch.equal(choices["arrow"], choices["ours"]) or cell.tokens == 1


def test_every_method_honours_the_permission_mask() -> None:
    cell = Cell(40, 4, 32, 12)
    permitted = torch.zeros(12, 64, dtype=torch.bool)
    permitted[:, [3, 17]] = True
    for name, choice in prepared(cell, permitted).items():
        assert set(choice.tolist()) <= {3, 17}, name


def test_lag_filters_to_twenty_by_gathering_or_by_scoring_all_alike() -> None:
    few, many = prepared(Cell(100, 4, 40, 4))["lag"], prepared(Cell(100, 4, 40, 30))["lag"]
    assert few.shape == (4,)
    assert many.shape == (30,)


def test_flops_and_bytes_are_those_of_the_papers_table() -> None:
    """SEQR paper, table 1: 66M, 33M, 5M, 4M and 64K, counting a multiplication and its addition as one."""
    cell = Cell(1_000, 8, 4_096, 1)
    assert flops("spectr", cell) == pytest.approx(2 * 33e6, rel=0.02)
    assert flops("arrow", cell) == pytest.approx(2 * 4e6, rel=0.03)
    assert flops("paper", cell) - 2 * 4_096 * 8 == pytest.approx(2 * 64e3, rel=0.13)
    assert flops("ours", cell) < 0.7 * flops("paper", cell)
    assert weight_bytes("ours", cell) == 4 * (1_000 * 36 + 8 * 4_096)


def test_a_cell_reports_every_method_or_the_reason_why_not() -> None:
    cell = Cell(20, 4, 32, 5)
    result = run_cell(cell, random_shelf(20, 4), 0.05)
    assert set(result.methods) | set(result.skipped) == set(METHODS)
    assert result.agree["paper"] == 1.0
    assert all(m["seconds"] > 0 and m["temporary bytes"] > 0 for m in result.methods.values())
    huge = run_cell(Cell(20, 4, 32, 5), random_shelf(20, 4), 1e-9)
    assert set(huge.skipped) == set(METHODS)
    assert "would take about" in huge.skipped["naive"]


def test_the_grid_is_the_issues() -> None:
    assert len(cells()) == 5 * 3 * 2 * 3
    results = run_grid(cells((10,), (4,), (16, 24), (1, 2)), 0.02, quiet)
    assert [result.cell for result in results] == cells((10,), (4,), (16, 24), (1, 2))


def test_functions_are_called_in_turn_and_equally_often() -> None:
    calls: list[str] = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.0, least=3)
    assert calls.count("a") == calls.count("b")
    assert timings["a"].samples == timings["b"].samples == 3


def test_peak_bytes_counts_what_lives_at_once_through_views_too() -> None:
    x = torch.zeros(1000)

    def function() -> torch.Tensor:
        y = (x + 1).view(10, 100)
        z = y * 2
        del y
        return (z + 1).sum()

    assert peak_bytes(function) == 2 * 4000 + 4
    assert peak_bytes(lambda: x.view(10, 100)) == 0


def test_packed_grams_are_those_of_the_library() -> None:
    shelf = assorted(6, 5, 100.0, torch.Generator().manual_seed(0))
    for i in range(5):
        expected = gram(shelf.r[i]) / shelf.sigma[i] ** 2
        torch.testing.assert_close(vech(shelf.r, shelf.sigma)[i], expected, rtol=1e-12, atol=1e-12)


class TestExactness:
    def test_no_token_of_any_kind_is_wrong(self) -> None:
        tallies = run_exactness(quiet, 24_000)
        assert sum(tally.tokens for tally in tallies) == pytest.approx(24_000, rel=0.01)
        assert [tally.wrong for tally in tallies] == [0] * len(tallies)

    def test_the_kinds_are_hard_enough_that_fp32_alone_is_wrong(self) -> None:
        tallies = {tally.name: tally for tally in run_exactness(quiet, 24_000)}
        assert tallies["adapters 1e-06 apart, r=8"].wrong_in_fp32 > 0
        assert tallies["borders of two adapters, r=8, condition 1e+08"].wrong_in_fp32 > 0
        assert tallies["equal adapters, r=8"].below_fp64 > 0

    def test_the_shares_of_the_kinds_add_up(self) -> None:
        assert sum(share for _, share, _, _ in kinds(torch.Generator().manual_seed(0))) == pytest.approx(1.0)

    def test_a_wrong_choice_is_counted(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shelf = assorted(4, 6, 10.0, generator)
        other = assorted(4, 6, 10.0, generator)
        lying = Shelf(shelf.r, shelf.mu, shelf.sigma, shelf.usable, other.columns, other.truth)
        tally = check("lying", lying, lambda n, dice: torch.randn(n, 4, generator=dice), 200, generator)
        assert tally.wrong > 0


class TestMemory:
    @pytest.mark.parametrize("adapters", [0, 1, 64, 65])
    def test_a_real_library_has_the_bytes_of_the_formula(self, adapters: int) -> None:
        library = bench_library(adapters, 8, 96)
        assert measured_bytes(library) == library_bytes(adapters, 8, [96] * DEPTH)

    def test_so_has_one_that_was_made_by_adding_adapters(self) -> None:
        plan = toy_plan()
        library = Library.empty(plan)
        for i in range(3):
            library = library.add(f"silo-{i}", 1, toy_adapter(plan, i))
        assert measured_bytes(library) == library_bytes(3, plan.rank, [spec.out_features for spec in plan.modules])

    @pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.name)
    @pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: placement.name)
    def test_the_largest_library_fits_and_one_block_more_does_not(self, budget: object, placement: object) -> None:
        count = largest_library(LLAMA_8B, 16, budget, placement)  # type: ignore[arg-type]
        device, _ = adapter_bytes(LLAMA_8B, 16, placement)  # type: ignore[arg-type]
        fixed = sum(fixed_bytes(LLAMA_8B, 16, budget).values())  # type: ignore[arg-type]
        limit = budget.device_bytes  # type: ignore[attr-defined]
        assert fixed + count * device <= limit < fixed + (count + 64) * device

    def test_a_model_that_does_not_fit_leaves_room_for_nobody(self) -> None:
        small = type(BUDGETS[0])("1 GiB", 2**30, 0, 0)
        assert largest_library(LLAMA_8B, 16, small, PLACEMENTS[0]) == 0

    def test_q_on_the_host_makes_room_for_many_more(self) -> None:
        rows = run_memory()
        assert len(rows) == len(BUDGETS) * len(PLACEMENTS)
        assert rows[0]["adapters"] > 50 * rows[1]["adapters"]


class TestOptions:
    @pytest.mark.parametrize("seconds", [0.0, -1.0, 601.0, float("nan")])
    def test_a_cells_seconds_must_be_in_range(self, seconds: float) -> None:
        with pytest.raises(BenchRefused, match=r"--cell-seconds must be between 0.1 and 600"):
            check_options(seconds, 1, "cpu")

    def test_at_least_one_token_must_be_checked(self) -> None:
        with pytest.raises(BenchRefused, match="--exact-tokens must be at least 1, got 0"):
            check_options(1.0, 0, "cpu")

    def test_an_unknown_device_is_refused(self) -> None:
        with pytest.raises(BenchRefused, match="--device must be cpu or cuda, got tpu"):
            check_options(1.0, 1, "tpu")

    def test_cuda_is_refused_and_the_sentence_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(BenchRefused, match="finds no CUDA device"):
            check_options(1.0, 1, "cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(BenchRefused, match="a benchmark of their own") as refusal:
            check_options(1.0, 1, "cuda")
        assert refusal.value.code == "bench_refused"


class TestCommand:
    def test_exactness_and_memory_write_a_report(self, tmp_path: Path) -> None:
        args = ["--exact", "--exact-tokens", "600", "--memory", "--out", str(tmp_path / "report")]
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / "report" / "routing.json").read_text())
        assert sum(row["wrong"] for row in report["exactness"]) == 0
        page = (tmp_path / "report" / "routing.md").read_text()
        assert "## Memory: Llama-3.1-8B" in page
        assert "## Bars" not in page
        assert str(tmp_path) not in page

    def test_a_wrong_choice_fails_the_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def one_wrong(say: object, tokens: int) -> list[object]:
            from seqr.bench.routing.exactness import Tally

            return [Tally("made up", tokens=1, wrong=1)]

        monkeypatch.setattr(command, "run_exactness", one_wrong)
        assert CliRunner().invoke(app, ["--exact", "--out", str(tmp_path)]).exit_code == 1

    def test_the_page_shows_bars_and_what_was_left_out(self) -> None:
        cell = run_cell(Cell(20, 4, 32, 5), random_shelf(20, 4), 0.05)
        left_out = Result(Cell(20, 4, 32, 6), {}, {"naive": "needs 9 GiB to set up"})
        page = to_markdown(
            {
                "machine": {"processor": "a CPU"},
                "command": "seqr bench routing",
                "seconds": 1.0,
                "notes": ["peft"],
                "bars": cell.as_dict(),
                "grid": [cell.as_dict(), left_out.as_dict()],
                "layers": run_layers([(3, 16, 2)], 0.01, quiet),
                "search": run_search((("random", 4),), 100, (1,), 0.01, quiet),
            }
        )
        assert "| arrow | 15x |" in page
        assert "T=6: naive (needs 9 GiB to set up)" in page
        assert "Not measured: peft" in page
        assert "leaves opened" in page
