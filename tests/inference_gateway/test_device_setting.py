"""The setting ``device`` decides what computes, and says what does not go."""

from pathlib import Path
from typing import Any

import pytest

from inference_gateway.errors import SettingsInvalid
from inference_gateway.service import choose_device
from inference_gateway.settings import Settings


@pytest.mark.parametrize(
    ("there", "given", "expected"),
    [
        (True, {}, "cuda"),
        (False, {}, "cpu"),
        (True, {"deterministic": True}, "cpu"),
        (True, {"device": "cpu"}, "cpu"),
        (True, {"device": "cuda"}, "cuda"),
    ],
)
def test_the_device_is_the_one_that_is_set_or_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool, given: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    assert choose_device(Settings(directory=tmp_path, **given)) == expected


def test_a_cuda_device_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SettingsInvalid, match='device is "cuda", and torch finds no CUDA device here'):
        choose_device(Settings(directory=tmp_path, device="cuda"))


def test_deterministic_serving_on_a_cuda_device_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(SettingsInvalid, match='deterministic serving is for CPUs only: set device to "cpu"'):
        choose_device(Settings(directory=tmp_path, device="cuda", deterministic=True))
