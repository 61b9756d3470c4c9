"""Calibration on public text: what a silo reports about its own adapter decides nothing (decision 7)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seqr.adapter import Adapter
from seqr.calibration import RunningMoments, norms
from seqr.errors import SeqrError
from seqr.frame import NO_FRAME, Frame
from seqr.plan import Plan
from seqr.routing.products import ExactFp32, project
from seqr.step import base_only


class CalibrationTextMissing(SeqrError):
    """No text, or none with a second token, to calibrate on."""

    code = "calibration_text_missing"


@dataclass(frozen=True)
class CalibrationText:
    """The tokens of one text, and which of its positions say nothing: position 0 and, in a chat, the frame."""

    ids: Sequence[int]
    frame: Frame = NO_FRAME


def collect_z(
    model: nn.Module,
    texts: Iterable[CalibrationText],
    plan: Plan,
    a: Mapping[str, torch.Tensor],
    *,
    batch_size: int = 16,
    max_length: int = 128,
) -> dict[str, torch.Tensor]:
    """z = A x of the base model's hidden states on ``texts``, per module of the plan: fp32 [T, r] on the CPU.

    Only positions that speak (``Frame``) are kept; a text is cut after ``max_length`` tokens. The model may be adapted
    or not: adapters take no part. Raises ``CalibrationTextMissing``.
    """
    spoken = []
    for text in texts:
        ids = list(text.ids)[:max_length]
        speaks = [text.frame.speaks(position) for position in range(len(ids))]
        if any(speaks):
            spoken.append((ids, speaks))
    if not spoken:
        raise CalibrationTextMissing("public calibration needs at least one text of two tokens or more")
    spoken.sort(key=lambda one: len(one[0]))
    collected: dict[str, list[torch.Tensor]] = {spec.name: [] for spec in plan.modules}
    device = next(model.parameters()).device
    for start in range(0, len(spoken), batch_size):
        batch = spoken[start : start + batch_size]
        width = max(len(ids) for ids, _ in batch)
        tokens = torch.tensor([row + [row[-1]] * (width - len(row)) for row, _ in batch], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch], device=device)
        keep = torch.tensor([speaks + [False] * (width - len(speaks)) for _, speaks in batch], device=device)
        with torch.inference_mode(), base_only(), _capture(model, plan, a, keep.flatten(), collected):
            # Without the output layer, which nothing here needs and which is a fifth of a small model.
            getattr(model, "base_model", model)(input_ids=tokens, attention_mask=mask, use_cache=False)
    with torch.inference_mode(False):
        return {name: torch.cat(parts).clone() for name, parts in collected.items()}


def calibrate(adapter: Adapter, z_by_module: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """(mu, sigma) of ||R z|| per module of ``adapter`` over the z of ``collect_z``."""
    statistics = {}
    for name, module in adapter.modules.items():
        moments = RunningMoments()
        moments.update(norms(module.r, z_by_module[name]))
        statistics[name] = (moments.mean, moments.std)
    return statistics


@contextmanager
def _capture(
    model: nn.Module,
    plan: Plan,
    a: Mapping[str, torch.Tensor],
    keep: torch.Tensor,
    collected: dict[str, list[torch.Tensor]],
) -> Iterator[None]:
    def hook_for(name: str) -> Any:
        a_t = a[name].to(keep.device, torch.float32).contiguous().T

        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])[keep]
            with ExactFp32(x.device.type):
                collected[name].append(project(x, a_t)[: x.shape[0]].cpu())

        return hook

    handles = [model.get_submodule(spec.name).register_forward_pre_hook(hook_for(spec.name)) for spec in plan.modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
