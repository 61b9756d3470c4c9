"""The report of ``seqr bench routing``: one JSON file with every figure, one Markdown page to read."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from seqr.bench.report_files import write_report_files
from seqr.bench.routing.methods import METHODS

BARS = (("arrow", 15.0), ("spectr", 150.0), ("paper", 1.8))
Report = dict[str, Any]


def write_report(report: Report, out: Path) -> tuple[Path, Path]:
    """Write routing.json and routing.md into ``out``; returns both paths."""
    return write_report_files("routing", report, to_markdown(report), out)


def to_markdown(report: Report) -> str:
    """The page; a section that was not run is left out."""
    sections: dict[str, Callable[[Any], str]] = {
        "bars": _bars,
        "grid": _grid,
        "layers": _layers,
        "peers": _peers,
        "search": _search,
        "exactness": _exactness,
        "memory": _memory,
    }
    parts = ["# Routing: every method side by side\n", _machine(report)]
    parts += [write(report[name]) for name, write in sections.items() if name in report]
    parts += [f"\nNot measured: {note}\n" for note in report.get("notes", [])]
    return "\n".join(parts)


def _machine(report: Report) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    return (
        f"`{report['command']}` took {report['seconds']:.0f} s on: {machine}.\n\n"
        "Times are medians from x to the choice, A x and the permission mask included, all methods of a cell "
        "interleaved in one run; only their ratios mean something on another machine.\n"
    )


def _bars(cell: Report) -> str:
    methods = cell["methods"]
    ours = methods["ours"]["seconds"]
    lines = [
        [name, f"{bar:g}x", f"{methods[name]['seconds'] / ours:.1f}x", _verdict(methods[name]["seconds"] / ours >= bar)]
        if name in methods
        else [name, f"{bar:g}x", "not run: " + cell["skipped"][name], "no"]
        for name, bar in BARS
    ]
    head = f"## Bars: N={cell['adapters']}, r={cell['rank']}, n={cell['width']}, T={cell['tokens']}\n\n"
    return head + _table(["ours is faster than", "bar", "measured", "met"], lines) + "\n" + _cell_table(cell)


def _cell_table(cell: Report) -> str:
    ours = cell["methods"]["ours"]["seconds"]
    rows = []
    for name, m in cell["methods"].items():
        spread = f"{_time(m['seconds, lower quartile'])} to {_time(m['seconds, upper quartile'])}"
        sizes = [_size(m["weight bytes"]), _size(m["temporary bytes"])]
        same = f"{100 * cell['share equal to exact'].get(name, float('nan')):.1f}%"
        rows.append([name, _time(m["seconds"]), spread, f"{m['seconds'] / ours:.2f}", _count(m["flops"]), *sizes, same])
    head = ["method", "median", "quartiles", "of ours", "FLOPs", "weights", "temporaries", "same as exact"]
    return _table(head, rows)


def _grid(cells: Sequence[Report]) -> str:
    rows, reasons = [], []
    for cell in cells:
        where = [str(cell[key]) for key in ("adapters", "rank", "width", "tokens")]
        methods = cell["methods"]
        rows.append([*where, *(_time(methods[m]["seconds"]) if m in methods else "-" for m in METHODS)])
        reasons += (
            [f"- N={where[0]}, r={where[1]}, n={where[2]}, T={where[3]}: {_why(cell)}"] if cell["skipped"] else []
        )
    text = "## Grid\n\n" + _table(["N", "r", "n", "T", *METHODS], rows)
    return text + ("\nLeft out:\n\n" + "\n".join(reasons) + "\n" if reasons else "")


def _why(cell: Report) -> str:
    return "; ".join(f"{name} ({reason})" for name, reason in cell["skipped"].items())


def _layers(rows: Sequence[Report]) -> str:
    lines = [
        [*(str(r[k]) for k in ("adapters", "rank", "width", "tokens")), _time(r["bare seconds"]),
         _time(r["routed seconds"]), f"{100 * r['bare seconds'] / r['routed seconds']:.0f}%"]
        for r in rows
    ]  # fmt: skip
    head = ["N", "r", "n", "T", "bare Linear", "routed Linear", "of the bare speed"]
    return "## The whole routed Linear, exact per-token choices, fp32\n\n" + _table(head, lines)


def _peers(rows: Sequence[Report]) -> str:
    lines = [
        [*(str(r[k]) for k in ("adapters", "rank", "width", "tokens")), _time(r["bare seconds"]),
         _time(r["peft seconds"]), _time(r["ours seconds"]), f"{r['peft seconds'] / r['ours seconds']:.1f}x"]
        for r in rows
    ]  # fmt: skip
    head = ["N", "r", "n", "T", "bare Linear", "peft's Arrow", "ours", "ours is faster"]
    return "## peft's Arrow layer (create_arrow_model, top_k 1)\n\n" + _table(head, lines)


def _search(rows: Sequence[Report]) -> str:
    lines = []
    for r in rows:
        seconds = r["seconds"]
        full = min(seconds["full, exact"], seconds["full, one product, not exact"])
        lines.append(
            [r["adapters"], str(r["N"]), str(r["rank"]), str(r["tokens"]), *(_time(s) for s in seconds.values()),
             f"{full / seconds['search']:.2f}x", f"{100 * r['leaves opened']:.1f}%", f"{r['build seconds']:.0f} s",
             _verdict(r["same choices as full, exact"])]
        )  # fmt: skip
    head = ["adapters", "N", "r", "T", *(rows[0]["seconds"] if rows else ()), "search against the faster full one"]
    note = (
        "Bar: 3x on adapters built around trained ones (`seqr/bench/routing/trained.py` says how). From z.\n\n"
        "What limits it: the bounds alone are an eighth of the full product, so the gain is below 8. A token opens a "
        "few percent of the leaves. 32 tokens open different ones, each for itself and all on one thread, while the "
        "product reads every adapter once for all of them, on all threads: search is for few tokens at a time.\n"
    )
    return "## Exact search\n\n" + note + "\n" + _table([*head, "leaves opened", "index built in", "same"], lines)


def _exactness(rows: Sequence[Report]) -> str:
    keys = ("tokens", "wrong", "wrong_in_fp32", "doubted", "below_fp64")
    total = ["all", *(f"{sum(row[key] for row in rows):,}" for key in keys)]
    lines = [[row["name"], *(f"{row[key]:,}" for key in keys)] for row in rows]
    head = ["tokens", "number", "not the oracle's choice", "wrong in fp32 alone", "looked at twice", "below fp64"]
    return "## Exactness, against an fp64 oracle\n\n" + _table(head, [*lines, total])


def _memory(rows: Sequence[Report]) -> str:
    lines = [
        [r["device"]["name"], r["placement"], f"{r['adapters']:,}", _size(r["device bytes per adapter"]),
         _size(r["host bytes per adapter"]), _size(r["host bytes of all"]), _size(sum(r["fixed bytes"].values())),
         f"{r['device']['kv_tokens']:,}"]
        for r in rows
    ]  # fmt: skip
    what = f"## Memory: {rows[0]['model']}, r={rows[0]['rank']}\n\n" if rows else ""
    head = ["device", "placement", "largest library", "device bytes each", "host bytes each", "host bytes of all"]
    note = (
        "Per adapter and module, F = r (r + 1) / 2: 4 F (gram, fp32) + 4 (mu / sigma) + R packed triangular 4 F + 32 "
        "for the exact choice; (Q R)^T: r m values. Fixed: bf16 weights, A in fp32, KV cache in bf16, workspace.\n"
    )
    return what + note + "\n" + _table([*head, "fixed", "of it KV tokens"], lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _time(seconds: float) -> str:
    return (
        f"{seconds * 1e6:.0f} us"
        if seconds < 1e-3
        else f"{seconds * 1e3:.3g} ms"
        if seconds < 1
        else f"{seconds:.3g} s"
    )


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def _count(number: float) -> str:
    return f"{number / 1e9:.3g} G" if number >= 1e9 else f"{number / 1e6:.3g} M"


def _verdict(met: bool) -> str:
    return "yes" if met else "no"
