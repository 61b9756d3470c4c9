"""``results.json``, ``report.md`` and the figures of a run, from what it has measured so far."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from seqr.bench.machine import describe_machine
from seqr.bench.paper.figures import write_figures
from seqr.bench.paper.flops import NAMES, paper_table
from seqr.bench.paper.summary import COMPARED, OURS, PARTS, PUBLISHED, Row, Summary
from seqr.bench.paper.workbench import Workbench

LABELS = {
    "base": "base model, no adapter", "mu": "MU: average of all", "arrow": "ARROW", "lag": "LAG, k = 3",
    "seqr": "SEQR per token (the paper)", "seqr_public": "SEQR per token, public mu and sigma",
    "evidence": "accumulated evidence, one pass", "lorauter": "LORAUTER, K = 3",
    "prompt_evidence": "evidence of the prompt (the default)",
    "even_evidence": "evidence of the prompt, all words alike",
    "early_evidence": "the same, first third of the modules",
    "oracle": "oracle: the task's own adapter",
}  # fmt: skip
Section = Callable[[Summary], list[str]]


def write_report(bench: Workbench, out: Path) -> Path:
    """Write all three to ``out``; returns the report's path."""
    note = out / "run.json"
    summary = Summary(bench, json.loads(note.read_bytes()).get("device", "cpu") if note.exists() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(summary.as_json(), indent=1) + "\n", "utf-8")
    figures = write_figures(summary, out)
    sections: list[Section] = [
        _setting, _main, _oracle, _maximising, _flops, _ablations, _large, _forbidden, _noise, _regimes,
    ]  # fmt: skip
    lines = ["# The SEQR paper's experiments, and evidence beside them", ""]
    for section in sections:
        if part := section(summary):
            lines += [*part, ""]
    lines += ["## Figures", "", *(f"![{name}]({file})" for name, file in figures.items()), ""]
    (out / "report.md").write_text("\n".join(lines), "utf-8")
    return out / "report.md"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]


def _setting(s: Summary) -> list[str]:
    recipe = s.settings.recipe
    return [
        f"Base model {s.model_name}; {len(s.tasks)} tasks, {s.settings.train_rows} training and {s.settings.test_rows} "
        f"test rows each, sequences of at most {s.settings.max_tokens} tokens; seeds {list(s.settings.seeds)}. "
        f"LoRA on the attention Linears, r = {recipe.rank}, alpha = {recipe.alpha:g}, {recipe.epochs} epoch(s) of "
        f"batches of {recipe.batch_size}, learning rate {recipe.learning_rate:g}, cosine. {_machines(s)}",
        "",
        "Accuracy is that of the label word of largest log-likelihood (hellaswag: the ending, per byte). Intervals are "
        "95%. p: paired sign-flip permutation test over test rows, 20,000 draws, against evidence of the prompt.",
        *_gaps(s),
    ]


def _machines(s: Summary) -> str:
    """Which device trained the adapters of each seed and measured its answers."""
    told = ("processor", "cores", "memory", "vector instructions", "torch")
    here = ", ".join(f"{key} {value}" for key, value in describe_machine().items() if key in told)
    of_device: dict[str, list[int]] = {}
    for seed, devices in s.devices().items():
        trained, measured = (" and ".join(_named(d) for d in devices[part]) for part in ("trained", "measured"))
        same = devices["trained"] == devices["measured"]
        text = f"trained and measured on {trained}" if same else f"trained on {trained}, measured on {measured}"
        of_device.setdefault(text, []).append(seed)
    parts = [f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} {text}" for text, seeds in of_device.items()]
    return f"Machines: {'; '.join(parts) or 'nothing measured yet'}. This report was written on: {here}."


def _named(device: str) -> str:
    return "a CPU" if device == "cpu" else f"one {device}"


def _gaps(s: Summary) -> list[str]:
    """What a whole run would have and this one has not: said, never left to be noticed."""
    wanted, done = len(s.settings.seeds), len(s.seeds(OURS))
    missing = [LABELS[name] for name in COMPARED if not s.seeds(name)]
    parts = [name for name in PARTS if s.extra(name) is None]
    lines = []
    if done < wanted:
        lines.append(f"**This run is not whole**: evidence of the prompt is measured for {done} of {wanted} seeds.")
    if missing:
        lines.append(f"Not measured: {', '.join(missing)}.")
    if parts:
        lines.append(f"Parts not measured: {', '.join(parts)}.")
    return ["", *lines] if lines else []


def _main(s: Summary) -> list[str]:
    rows = s.main_table()
    if not rows:
        return []
    head = ["router", "seeds", *s.tasks, "average", "95%", "own share", "p"]
    return [
        "## Table 3: percent of the oracle",
        "",
        *table(head, [_main_row(s, row) for row in rows]),
        "",
        *_verdict(rows),
    ]


def _main_row(s: Summary, row: Row) -> list[str]:
    cells = [f"{row.percent[t]:.1f}" + (f" ±{row.deviation[t]:.1f}" if t in row.deviation else "") for t in s.tasks]
    share = "-" if row.share is None else f"{row.share:.2f}"
    low, high = row.interval
    p = "-" if row.p is None else f"{row.p:.2g}" if row.p > 1 / 20_000 else "< 1e-4"
    return [LABELS[row.router], str(row.seeds), *cells, f"**{row.average:.1f}**", f"{low:.1f} to {high:.1f}", share, p]


def _verdict(rows: list[Row]) -> list[str]:
    ours = next((row for row in rows if row.router == OURS), None)
    others = [row for row in rows if row.router in PUBLISHED]
    if ours is None or not others:
        return []
    best = max(others, key=lambda row: row.average)
    below = [LABELS[row.router] for row in others if row.average >= ours.average]
    close = [LABELS[row.router] for row in others if row.p is not None and row.p >= 0.01]
    lines = [
        f"Bar: at least 99% of the oracle on average: {ours.average:.1f}%, "
        f"**{'reached' if ours.average >= 99 else 'not reached'}**. "
        f"Bar: own-adapter share at least 0.85: {ours.share or 0:.2f}, "
        f"**{'reached' if (ours.share or 0) >= 0.85 else 'not reached'}**. "
        f"The best published router is {LABELS[best.router]} with {best.average:.1f}%.",
        f"Bar: above every published router with p < 0.01: **{'not reached' if below or close else 'reached'}**"
        + (f"; not below it: {', '.join(below)}" if below else "")
        + (f"; not separated from it: {', '.join(close)}" if close else "")
        + ".",
    ]
    by_name = {row.router: row.average for row in rows}
    paper = [name for name in ("mu", "arrow", "lag", "seqr") if name in by_name]
    order = sorted(paper, key=lambda name: by_name[name])
    if len(paper) == 4:
        middle = by_name["arrow"], by_name["lag"]
        same = by_name["mu"] < min(middle) and by_name["seqr"] > max(middle)
        lines.append(
            f"The paper's order is MU < ARROW, LAG < SEQR. Here, low to high: {', '.join(LABELS[n] for n in order)}: "
            f"{'reproduced' if same else 'not reproduced'}."
        )
    return lines


def _oracle(s: Summary) -> list[str]:
    scores = s.oracle_scores()
    names = {"base": "base model", "oracle": "shared A (table 4, and 2)", "unique_oracle": "an A each (table 2)"}
    if not scores:
        return []
    rows = [
        [names[router], str(entry["seeds"]), *(_accuracy(entry[t]) for t in s.tasks), f"{100 * entry['average']:.1f}"]
        for router, entry in scores.items()
    ]
    return [
        "## Tables 2 and 4: accuracy with the right adapter, %",
        "",
        *table(["", "seeds", *s.tasks, "average"], rows),
    ]


def _accuracy(entry: Mapping[str, float]) -> str:
    return f"{100 * entry['accuracy']:.1f} ({100 * entry['low']:.0f} to {100 * entry['high']:.0f})"


def _maximising(s: Summary) -> list[str]:
    result = s.extra("maximising")
    if result is None:
        return []
    rows = [[name, f"{100 * share:.4g}"] for name, share in result["share"].items()]
    return [
        "## Figure 4: choices that maximise the norm", "",
        f"{result['pairs']:,} (token, module) pairs, against the fp64 argmax.", "", *table(["router", "%"], rows),
    ]  # fmt: skip


def _flops(s: Summary) -> list[str]:
    rows = [
        [NAMES.get(str(r["method"]), str(r["method"])), f"{r['flops']:,}", f"{r['profiled']:,}", f"{r['bytes']:,}"]
        for r in paper_table()
    ]
    head = ["method", "operations per token", "seen by torch's profiler", "bytes of weights"]
    return [
        "## Table 1 and figure 5: cost of routing",
        "",
        "N = 1,000, n = m = 4,096, r = 8, k = 20.",
        "",
        *table(head, rows),
    ]


def _ablations(s: Summary) -> list[str]:
    result = s.extra("ablations")
    if result is None:
        return []
    rows = [
        [label, *(f"{100 * shares[t]:.0f}" for t in s.tasks), f"{100 * np.mean([shares[t] for t in s.tasks]):.1f}"]
        for label, shares in result.items()
    ]
    return [
        "## Evidence, part by part", "",
        "Percent of prompts whose own adapter comes first, first seed.", "",
        *table(["rule", *s.tasks, "average"], rows),
    ]  # fmt: skip


def _large(s: Summary) -> list[str]:
    result = s.extra("distractors")
    if result is None:
        return []
    oracle = s.rights("oracle", s.settings.seeds[0]) or {}
    best = {t: max(oracle[t][: result["rows"]].mean(), 1e-9) for t in s.tasks}

    def entries(rule: str, size: int) -> list[Any]:
        return [result["tasks"][t][rule][str(size)] for t in s.tasks]

    def percent(rule: str, size: int) -> float:
        each = [100 * np.mean(e["right"]) / best[t] for t, e in zip(s.tasks, entries(rule, size), strict=True)]
        return float(np.mean(each))

    def cell(rule: str, size: int) -> str:
        return f"{percent(rule, size):.1f} ({np.mean([e['share'] for e in entries(rule, size)]):.2f})"

    rows = [[str(size), *(cell(rule, size) for rule in result["rules"])] for size in result["sizes"]]
    most = max(result["sizes"])
    kept = percent(OURS, most)
    return [
        "## A library that grows", "",
        f"The first {result['rows']} test rows of each task, first seed: percent of the oracle, and in brackets the "
        "share of prompts that got their own adapter. Distractors are the real adapters turned by random orthogonal "
        "matrices: as loud, listening elsewhere.", "",
        *table(["distractors", *(LABELS[rule] for rule in result["rules"])], rows), "",
        f"Bar: at least 97% of the oracle beside {most:,} distractors: {kept:.1f}%, "
        f"**{'reached' if kept >= 97 else 'not reached'}**.",
    ]  # fmt: skip


def _forbidden(s: Summary) -> list[str]:
    result = s.extra("forbidden")
    if result is None:
        return []
    rows = []
    for label in next(iter(result["tasks"].values()))["forbidden"]:
        row = ["always somebody" if label == "always" else f"nobody at or below {label}"]
        for case in ("permitted", "forbidden"):
            entries = [result["tasks"][t][case][label] for t in s.tasks]
            row += [
                f"{100 * np.mean([np.mean(e['right']) for e in entries]):.1f}",
                f"{100 * np.mean([e['nobody'] for e in entries]):.0f}",
            ]
        rows.append(row)
    head = ["threshold", "all permitted: accuracy", "nobody, %", "own silo forbidden: accuracy", "nobody, %"]
    return [
        "## When the right silo is forbidden",
        "",
        "Mean accuracy over tasks, %, first seed.",
        "",
        *table(head, rows),
    ]


def _noise(s: Summary) -> list[str]:
    result = s.extra("noise")
    if result is None:
        return []
    rows = [
        [level, *(f"{100 * np.mean(list(result[name][level].values())):.1f}" for name in ("seqr", "prompt_evidence"))]
        for level in result["seqr"]
    ]
    return [
        "## Figure 6: noise on mu", "",
        f"Mean accuracy, %; SEQR per token on {result['rows']} rows a task, evidence on all.", "",
        *table(["noise, in sigma", "SEQR per token", "evidence of the prompt"], rows),
    ]  # fmt: skip


def _regimes(s: Summary) -> list[str]:
    labels = {
        "lorauter-semi": "LORAUTER, semi-OOD: adapter gone, task data kept", "lorauter-ood": "LORAUTER, OOD: both gone",
        "seqr-ood": "SEQR per token, adapter gone",
    }  # fmt: skip
    oracle = s.rights("oracle", s.settings.seeds[0])
    rows = []
    for name, label in labels.items():
        if oracle and (result := s.extra(f"regime-{name}")):
            right = {t: result["tasks"][t]["right"] for t in s.tasks}
            rows.append([label, *_percents(s, right, oracle)])
    if oracle and (forbidden := s.extra("forbidden")):
        right = {t: forbidden["tasks"][t]["forbidden"]["always"]["right"] for t in s.tasks}
        rows.append(["evidence of the prompt, adapter gone", *_percents(s, right, oracle)])
    if not rows:
        return []
    return ["## A task whose adapter is withheld: percent of oracle", "", *table(["regime", *s.tasks, "average"], rows)]


def _percents(s: Summary, right: Mapping[str, Any], oracle: Mapping[str, Any]) -> list[str]:
    values = [100 * np.mean(right[t]) / max(oracle[t].mean(), 1e-9) for t in s.tasks]
    return [*(f"{v:.1f}" for v in values), f"{np.mean(values):.1f}"]
