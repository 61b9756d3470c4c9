"""With one worker the benchmark runs in the caller's process, whose settings are the caller's."""

from pathlib import Path

import pytest
import torch

from seqr.bench.paper import command, plan


def test_one_worker_leaves_the_process_as_it_found_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class NoPlan:
        def __init__(self, *_: object) -> None: ...

        def units(self) -> list[object]:
            return []

    monkeypatch.setattr(plan, "Plan", NoPlan)
    monkeypatch.setattr(command, "bench_of", lambda run: None)
    threads = torch.get_num_threads()
    run = command.Run(tmp_path, tmp_path, tmp_path, tmp_path, None, every=False, threads=threads + 1, device="cpu")  # type: ignore[arg-type]
    command._work_together(run, 1)
    assert torch.get_num_threads() == threads
    assert torch.tensor(1e-42).mul(1.0).item() > 0, "denormal numbers must not be flushed to zero"
