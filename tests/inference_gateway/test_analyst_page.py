"""The examples of docs/analyst.md run as they stand, but for the names of the model and the silo."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.inference_gateway.conftest import Running

PAGE = Path(__file__).parents[2] / "docs" / "analyst.md"


def examples(language: str) -> list[str]:
    text = PAGE.read_text().replace("SmolLM2-135M-Instruct", "tiny").replace("harrow-clinic", "alpha")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def environment(running: Running) -> dict[str, str]:
    return os.environ | {"OPENAI_BASE_URL": f"{running.url}/v1", "OPENAI_API_KEY": running.world.keys["alice"]}


def test_the_pages_python_runs(running: Running) -> None:
    blocks = examples("python")
    assert len(blocks) >= 6
    command = [sys.executable, "-c", "\n".join(blocks)]
    ran = subprocess.run(command, env=environment(running), capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_pages_shell_commands_run(running: Running) -> None:
    lines = "\n".join(examples("sh"))
    assert lines.count("curl") >= 4
    script = "set -e\n" + re.sub(r"^export .*$", "", lines, flags=re.MULTILINE).replace("curl -s", "curl -sf")
    command = ["bash", "-c", script]
    ran = subprocess.run(command, env=environment(running), capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    for told in ("silo:alpha", "chat.completion", "token_strs", '"prompt"'):
        assert told in ran.stdout
