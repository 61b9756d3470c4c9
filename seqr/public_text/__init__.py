"""Short public texts on which every adapter is calibrated: nobody's data, the same in every gateway of a release."""

from importlib.resources import files
from typing import Any

from seqr.frame import ChatFrame, common_prefix
from seqr.public_calibration import CalibrationText


def public_texts() -> tuple[str, ...]:
    """The texts, in order: statements, questions, requests, notices, code and figures, a sentence or two each."""
    return tuple(line for line in _read().splitlines() if line)


def _read() -> str:
    return (files(__package__ or __name__) / "texts.txt").read_text(encoding="utf-8")


def framed(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The tokens of ``text`` as a user's message, as the engine will see it, where the model has a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        return tuple(tokenizer(text)["input_ids"])
    message = [{"role": "user", "content": text}]
    return tuple(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"])


def chat_frame(tokenizer: Any) -> ChatFrame:
    """What every conversation begins and ends with, before and after anything a user said; may be empty."""
    first, second = (framed(tokenizer, text) for text in ("A", "7"))
    prefix = common_prefix(first, second)
    suffix = min(common_prefix(first[::-1], second[::-1]), len(first) - prefix, len(second) - prefix)
    return ChatFrame(first[:prefix], first[len(first) - suffix :])


def calibration_texts(tokenizer: Any) -> list[CalibrationText]:
    """Every fourth public text, framed: their words, and not the frame, are what an adapter is calibrated on.

    A start takes as long as they are; twice as many chose no better, and fewer chose worse (docs/decisions/0007).
    """
    frame = chat_frame(tokenizer)
    tokens = (framed(tokenizer, text) for text in public_texts()[::4])
    return [CalibrationText(ids, frame.of(ids)) for ids in tokens]
