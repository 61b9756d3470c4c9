"""The figures of a run, as SVG files beside the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from seqr.bench.paper.flops import METHODS, NAMES, flops, stored
from seqr.bench.paper.summary import Summary

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def write_figures(summary: Summary, out: Path) -> dict[str, str]:
    """Draw what has been measured; returns file name by figure."""
    drawn = {"flops": _flops(out / "figure-5-flops.svg")}
    kinds = {"unique A": summary.extra("unique-norms"), "shared A": summary.extra("norms")}
    if measured := {kind: norms for kind, norms in kinds.items() if norms is not None}:
        drawn["norms"] = _distributions(summary.tasks, measured, out / "figure-2-norms.svg")
        drawn["heat"] = _heat_maps(summary.tasks, measured, out / "figure-3-heat-maps.svg")
    if maximising := summary.extra("maximising"):
        drawn["maximising"] = _maximising(maximising, out / "figure-4-maximising.svg")
    if noise := summary.extra("noise"):
        drawn["noise"] = _noise(noise, summary, out / "figure-6-noise.svg")
    return drawn


def _save(figure: Any, file: Path) -> str:
    figure.tight_layout()
    # No date and no version: the same results draw the same file.
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return file.name


def _flops(file: Path) -> str:
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), sharey="row")
    ranges: Sequence[tuple[str, Sequence[int]]] = (
        ("adapters N (n = m = 4096, r = 8)", [10, 100, 1000, 10_000, 100_000]),
        ("dimension n = m (N = 1000, r = 8)", [256, 576, 1024, 2048, 4096, 8192]),
        ("rank r (N = 1000, n = m = 4096)", [4, 8, 16, 32, 64]),
    )
    for column, (label, values) in enumerate(ranges):
        for method in METHODS:
            shapes = [((v, 8, 4096), (1000, 8, v), (1000, v, 4096))[column] for v in values]
            axes[0][column].loglog(values, [flops(method, a, r, n, n) for a, r, n in shapes], marker=".")
            axes[1][column].loglog(values, [stored(method, a, r, n, n) for a, r, n in shapes], marker=".")
        for axis in axes[:, column]:
            axis.set_xticks(values, [f"{v:,}" for v in values], rotation=45, fontsize=8)
            axis.minorticks_off()
        axes[1][column].set_xlabel(label)
    axes[0][0].set_ylabel("operations per token")
    axes[1][0].set_ylabel("bytes read per token")
    axes[0][0].legend([NAMES.get(m, m) for m in METHODS], fontsize=8)
    return _save(figure, file)


def _distributions(tasks: Sequence[str], of_kind: Mapping[str, Any], file: Path) -> str:
    figure, axes = plt.subplots(1, len(of_kind), figsize=(5.5 * len(of_kind), 3.6), sharey=True, squeeze=False)
    for axis, (kind, norms) in zip(axes.flat, of_kind.items(), strict=True):
        values = np.asarray(norms["raw"])
        axis.boxplot([values[:, adapter] for adapter in range(values.shape[1])])
        axis.set_xticks(range(1, len(tasks) + 1), tasks, rotation=60, fontsize=8)
        axis.set_title(f"{kind}: mean norm of each adapter over the tasks", fontsize=9)
    return _save(figure, file)


def _heat_maps(tasks: Sequence[str], of_kind: Mapping[str, Any], file: Path) -> str:
    scales = {"raw": "raw", "own": "z-scored on own data", "public": "z-scored on public text"}
    panels = [
        (f"{kind}, {label}", np.asarray(norms[scale]))
        for kind, norms in of_kind.items()
        for scale, label in scales.items()
        if scale in norms
    ]
    figure, axes = plt.subplots(-(-len(panels) // 3), 3, figsize=(12, 4.2 * -(-len(panels) // 3)), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, grid) in zip(axes.flat, panels, strict=False):
        # Each row by its own range: the question is which adapter is brightest for a task.
        low, high = grid.min(1, keepdims=True), grid.max(1, keepdims=True)
        axis.imshow((grid - low) / np.maximum(high - low, 1e-12), cmap="viridis")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=7)
        axis.set_yticks(range(len(tasks)), tasks, fontsize=7)
        axis.set_xlabel("adapter", fontsize=8)
        axis.set_ylabel("text of", fontsize=8)
    return _save(figure, file)


def _maximising(result: Mapping[str, Any], file: Path) -> str:
    share = result["share"]
    ks = sorted(int(name.removeprefix("lag ")) for name in share if name.startswith("lag "))
    figure, axis = plt.subplots(figsize=(6, 3.6))
    axis.plot(ks, [100 * share[f"lag {k}"] for k in ks], marker="o", label="LAG")
    for name, style in (("arrow", ":"), ("spectr", "--"), ("seqr", "-")):
        axis.axhline(100 * share[name], linestyle=style, color="black", linewidth=1, label=name.upper())
    axis.set_xlabel("k of LAG")
    axis.set_ylabel("% of choices with the largest norm")
    axis.legend(fontsize=8)
    return _save(figure, file)


def _noise(result: Mapping[str, Any], summary: Summary, file: Path) -> str:
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for name, label in (("seqr", "SEQR per token"), ("prompt_evidence", "evidence of the prompt")):
        points = {float(i): np.mean(list(by_task.values())) for i, by_task in result[name].items()}
        axis.plot(list(points), [100 * v for v in points.values()], marker="o", label=label)
    axis.set_xlabel("noise on mu, in sigma")
    axis.set_ylabel(f"accuracy, mean of {len(summary.tasks)} tasks, %")
    axis.legend(fontsize=8)
    return _save(figure, file)
