"""Public calibration: the base model's hidden states on text that belongs to nobody."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seqr.adapter import Adapter
from seqr.calibration import norms
from seqr.frame import Frame
from seqr.library import Library
from seqr.models import load_base_model
from seqr.plan import Plan
from seqr.public_calibration import CalibrationText, CalibrationTextMissing, calibrate, collect_z
from seqr.routed_linear import adapt_model
from seqr.shared_a import verify_a
from seqr.step import StepMissing, get_context

TEXTS = [
    "The moon is far.",
    "Bread needs flour, water, salt and time.",
    "No.",
    "A longer text about nothing at all, really.",
]


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_base_model(str(tiny_model_dir), torch.float32)


def tokens_of(tokenizer: Any, texts: list[str], frame: Frame = Frame()) -> list[CalibrationText]:
    return [CalibrationText(tokenizer(text)["input_ids"], frame) for text in texts]


def one_by_one(base: tuple[Any, Any], plan: Plan, texts: list[str]) -> dict[str, torch.Tensor]:
    """The obvious way: one text at a time, nothing padded, inputs taken from the layers."""
    model, tokenizer = base
    seen: dict[str, list[torch.Tensor]] = {spec.name: [] for spec in plan.modules}

    def keep(name: str, a: torch.Tensor) -> Any:
        return lambda _module, args: seen[name].append(args[0][0, 1:] @ a.T)

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name, a)) for name, a in verify_a(plan).items()]
    with torch.inference_mode():
        for text in texts:
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_z_is_a_x_of_every_token_but_the_first_of_each_text(base: tuple[Any, Any], tiny_plan: Plan) -> None:
    model, tokenizer = base
    texts = sorted(TEXTS, key=lambda text: len(tokenizer(text)["input_ids"]))
    expected = one_by_one(base, tiny_plan, texts)
    for batch_size in (1, 3, 16):
        got = collect_z(model, tokens_of(tokenizer, texts), tiny_plan, verify_a(tiny_plan), batch_size=batch_size)
        assert list(got) == [spec.name for spec in tiny_plan.modules]
        for name, z in got.items():
            assert z.dtype == torch.float32
            torch.testing.assert_close(z, expected[name], rtol=1e-4, atol=1e-5)


def test_a_long_text_is_cut_and_a_text_of_one_token_says_nothing(base: tuple[Any, Any], tiny_plan: Plan) -> None:
    model, tokenizer = base
    texts = tokens_of(tokenizer, ["x", "abcdefghij"])
    z = collect_z(model, texts, tiny_plan, verify_a(tiny_plan), max_length=6)
    assert {part.shape[0] for part in z.values()} == {5}


def test_the_frame_of_a_chat_is_left_out(base: tuple[Any, Any], tiny_plan: Plan) -> None:
    model, tokenizer = base
    ids = tokenizer("abcdefghij")["input_ids"]
    whole, framed = (
        collect_z(model, [CalibrationText(ids, frame)], tiny_plan, verify_a(tiny_plan))
        for frame in (Frame(), Frame(3, range(len(ids) - 2, len(ids))))
    )
    for name, z in framed.items():
        assert torch.equal(z, whole[name][2:-2])


@pytest.mark.parametrize("texts", [[], ["x"], ["", "y"]])
def test_nothing_to_calibrate_on_is_refused(base: tuple[Any, Any], tiny_plan: Plan, texts: list[str]) -> None:
    with pytest.raises(CalibrationTextMissing, match="two tokens") as refusal:
        collect_z(base[0], tokens_of(base[1], texts), tiny_plan, verify_a(tiny_plan))
    assert refusal.value.code == "calibration_text_missing"


def test_an_adapted_model_calibrates_like_the_bare_one(
    tiny_model_dir: Path, base: tuple[Any, Any], tiny_plan: Plan
) -> None:
    a = verify_a(tiny_plan)
    bare = collect_z(base[0], tokens_of(base[1], TEXTS), tiny_plan, a)
    model, tokenizer = load_base_model(str(tiny_model_dir), torch.float32)
    adapt_model(model, tiny_plan, a)
    adapted = collect_z(model, tokens_of(tokenizer, TEXTS), tiny_plan, a)
    assert all(torch.equal(bare[name], adapted[name]) for name in bare)
    with pytest.raises(StepMissing):
        get_context()


def test_mu_and_sigma_are_the_moments_of_the_norms(
    base: tuple[Any, Any], tiny_plan: Plan, make_adapter: Callable[..., Adapter]
) -> None:
    z = collect_z(base[0], tokens_of(base[1], TEXTS), tiny_plan, verify_a(tiny_plan))
    adapter = make_adapter(tiny_plan, 1)
    stats = calibrate(adapter, z)
    for name, (mu, sigma) in stats.items():
        values = norms(adapter.modules[name].r, z[name])
        assert mu == pytest.approx(float(values.mean()))
        assert sigma == pytest.approx(float(values.std(unbiased=False)))
    library = Library.empty(tiny_plan).add("a", 1, adapter, stats)
    assert bool(torch.isfinite(library.stacks[0].offset).all())


def test_an_adapter_that_learned_nothing_is_calibrated_and_never_usable(
    base: tuple[Any, Any], tiny_plan: Plan, make_adapter: Callable[..., Adapter]
) -> None:
    adapter = make_adapter(tiny_plan, 1)
    for part in adapter.modules.values():
        part.r.zero_()
    stats = calibrate(adapter, collect_z(base[0], tokens_of(base[1], TEXTS), tiny_plan, verify_a(tiny_plan)))
    assert set(stats.values()) == {(0.0, 0.0)}
    library = Library.empty(tiny_plan).add("a", 1, adapter, stats)
    assert bool(torch.isnan(library.stacks[0].offset[0]))
