"""A benchmark's report on disk: one JSON file with every figure, one Markdown page to read."""

import json
from pathlib import Path
from typing import Any


def write_report_files(name: str, report: dict[str, Any], page: str, out: Path) -> tuple[Path, Path]:
    """Write ``name``.json and ``name``.md into ``out``, which is made if need be; returns both paths."""
    out.mkdir(parents=True, exist_ok=True)
    data, text = out / f"{name}.json", out / f"{name}.md"
    data.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    text.write_text(page, encoding="utf-8")
    return data, text
