"""The report of ``seqr bench gateway``: one JSON file with every figure, one Markdown page to read."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from seqr.bench.report_files import write_report_files

Report = dict[str, Any]


def write_report(report: Report, out: Path) -> tuple[Path, Path]:
    """Write gateway.json and gateway.md into ``out``; returns both paths."""
    return write_report_files("gateway", report, to_markdown(report), out)


def to_markdown(report: Report) -> str:
    """The page; a section that was not run is left out."""
    sections: dict[str, Callable[[Any], str]] = {
        "bars": _bars,
        "speed": _speed,
        "memory": _memory,
        "telling": _telling,
        "crowd": _crowd,
    }
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    parts = [f"`{report['command']}` took {report['seconds']:.0f} s on: {machine}.\n", _workload(report["workload"])]
    parts += [write(report[name]) for name, write in sections.items() if name in report]
    parts += [f"Not measured: {note}\n" for note in report["notes"]]
    return "\n".join(parts)


def _workload(work: Report) -> str:
    return (
        f"{work['model']} in {work['dtype']}, {work['streams']} concurrent streams, each with a prompt of "
        f"{work['prompt']} tokens and {work['tokens']} generated ones; adapters of rank {work['rank']} on all "
        "attention Linears, B drawn at random with the norm of trained ones: speed does not depend on its values. "
        f"{work['rounds']} rounds of all cases in turn after one that is not counted. Speeds count prompt and answer "
        "together: generated tokens over the seconds from the first request to the last token. A ratio is the median "
        "of the rounds' own ratios, with the lowest and highest. Between tokens: from one token of a stream to its "
        "next, once it has begun, and the pace that this is of the same case.\n"
    )


def _bars(rows: Sequence[Report]) -> str:
    lines = [[r["what"], f">= {r['bar']:.0%}", f"{r['measured']:.1%}", "yes" if r["met"] else "no"] for r in rows]
    return "## Bars\n\n" + _table(["what", "bar", "measured", "met"], lines)


def _speed(rows: Sequence[Report]) -> str:
    lines = []
    for r in rows:
        ratio = "-"
        if "ratio" in r:
            ratio = f"{r['ratio']:.1%} ({r['lowest ratio']:.1%} to {r['highest ratio']:.1%}) of {r['against']}"
        first = [_time(r[name]) if name in r else "-" for name in ("first token p50", "first token p99")]
        between = _time(r["between tokens p50"]) if "between tokens p50" in r else "-"
        between += f" ({r['pace ratio']:.1%})" if "pace ratio" in r else ""
        spread = f"{r['lowest']:.1f} to {r['highest']:.1f}"
        lines.append([r["case"], f"{r['tokens per second']:.1f}", spread, ratio, *first, between])
    head = ["case", "tokens/s", "lowest and highest", "ratio", "first token p50", "p99", "between tokens (pace)"]
    return "## Speed\n\n" + _table(head, lines)


def _memory(row: Report) -> str:
    return (
        "## Memory per adapter\n\n"
        f"{_size(row['tensor bytes per adapter'])} of tensors, counted; {_size(row['resident bytes per adapter'])} of "
        f"resident memory, measured while {row['adapters']} adapters were drawn.\n"
    )


def _telling(rows: Sequence[Report]) -> str:
    lines = [
        [r["what"], str(r["samples"]), *(_time(t) for t in r["medians"]), f"{r['D']:.3f}", f"{r['p']:.3g}",
         "yes" if r["indistinguishable"] else "no"]
        for r in rows
    ]  # fmt: skip
    head = ["times of", "samples each", "median", "median of the other", "D", "p", "indistinguishable (p >= 0.001)"]
    return "## What the clock tells about forbidden silos (two-sided Kolmogorov-Smirnov)\n\n" + _table(head, lines)


def _crowd(row: Report) -> str:
    head = (
        f"## {row['streams']} concurrent streams for {row['seconds']:.0f} s over HTTP\n\n"
        f"{row['adapters']} silos, {row['tokens each']} tokens each, {row['pieces per second']:.1f} pieces of text per "
        f"second. Errors beyond 429 and 503: {row['errors']}.\n\n"
    )
    ends = _table(["end", "requests"], [[end, str(count)] for end, count in row["ends"].items()])
    waits = ""
    if "answer p50" in row:
        names = ("first piece p50", "first piece p99", "answer p50", "answer p99")
        waits = "\n" + ", ".join(f"{name}: {_time(row[name])}" for name in names) + ".\n"
    memory = ", ".join(_size(size) for size in row["resident bytes by quarter"])
    flat = "flat" if row["flat"] else "not flat"
    return head + ends + waits + f"\nResident memory by quarter of the time: {memory}: {flat}.\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
