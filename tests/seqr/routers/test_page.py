"""The example of docs/routers.md runs as it is printed."""

import re
from pathlib import Path
from typing import Any

import torch

from tests.seqr.test_peft_checkpoint import save

PAGE = Path(__file__).parents[3] / "docs" / "routers.md"


def test_the_example_of_the_page_runs(tiny_model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    given = {
        "checkpoints": [save(tiny_model_dir, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))],
        "some_public_sentences": ["The river froze in January.", "Bread needs flour, water and time."],
        "prompts": ["Who keeps the keys?", "Name a tree."],
    }
    exec(compile(code.replace("path/to/base-model", str(tiny_model_dir)), str(PAGE), "exec"), given)
    assert given["logits"].shape[:2] == given["ids"].shape
    assert bool(torch.isfinite(given["logits"]).all())
    chosen = re.findall(r"'(\w+)'", capsys.readouterr().out)
    assert len(chosen) == 2 and set(chosen) <= {"one", "two"}
