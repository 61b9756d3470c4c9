"""Public statistics of a pool are the moments of every norm on the base model's hidden states."""

from pathlib import Path

import pytest
import torch

from seqr.models import load_base_model
from seqr.public_calibration import CalibrationTextMissing
from seqr.routers.calibration import public_statistics
from seqr.routers.pool import AdapterPool, LoraFactors

MODULE = "model.layers.1.self_attn.v_proj"


@pytest.fixture(params=[True, False], ids=["shared A", "unique A"])
def pool(request: pytest.FixtureRequest) -> AdapterPool:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 64, generator=generator)
    adapters = {}
    for index in range(3):
        own = a if request.param else torch.randn(4, 64, generator=generator)
        b = torch.randn(32, 4, generator=generator) * (index + 1)
        adapters[f"adapter-{index}"] = {MODULE: LoraFactors(own, b)}
    return AdapterPool(adapters)


def test_mu_and_sigma_are_those_of_every_norm_but_the_first_tokens(tiny_model_dir: Path, pool: AdapterPool) -> None:
    model, _ = load_base_model(tiny_model_dir, torch.float32)
    texts = [[5, 9, 40, 7, 22, 80], [6, 3, 3], [1], [8, 8, 2, 30]]
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(MODULE).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, 1:]))
    with torch.inference_mode():
        for text in texts:
            model(input_ids=torch.tensor([text]))
    handle.remove()
    x = torch.cat(seen).double()
    statistics = public_statistics(model, pool, texts, pad_token=0, batch_size=2)
    for column in range(3):
        a = pool.a[0] if pool.shared else pool.a[0][column]
        dense = pool.b_t[0][column].T.double() @ a.double()
        norms = (x @ dense.T).norm(dim=1)
        assert float(statistics.mu[0, column]) == pytest.approx(float(norms.mean()), rel=1e-4)
        assert float(statistics.sigma[0, column]) == pytest.approx(float(norms.std(correction=0)), rel=1e-4)


def test_calibration_without_a_word_is_refused(tiny_model_dir: Path, pool: AdapterPool) -> None:
    model, _ = load_base_model(tiny_model_dir, torch.float32)
    with pytest.raises(CalibrationTextMissing, match="at least one text of two tokens"):
        public_statistics(model, pool, [[1], []], pad_token=0)
