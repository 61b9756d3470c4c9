"""Linears that stand in for the model's own say the same, over the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inference_gateway.engine.linears import FEW_ROWS, FewRowsLinear, StandIn, TiledLinear, replace_linears
from inference_gateway.engine.transformers_engine import TransformersEngine
from seqr.plan import Plan
from tests.inference_gateway.support import serve


@pytest.mark.parametrize("kind", [FewRowsLinear, TiledLinear])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (2,), (1, 16), (1, FEW_ROWS), (1, FEW_ROWS + 1), (3, 5)])
def test_a_stand_in_says_what_the_linear_says(kind: type[StandIn], bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias)
    x = torch.randn(*shape, 48)
    with torch.inference_mode():
        got = kind(linear)(x)
        torch.testing.assert_close(got, F.linear(x.double(), linear.weight.double(), _double(linear.bias)).float())
    assert got.shape == (*shape, 80) and got.is_contiguous()


def test_a_stand_in_shares_the_weights_and_a_tied_one_stays_tied() -> None:
    model = nn.ModuleDict({"head": nn.Linear(8, 20, False), "words": nn.Embedding(20, 8)})
    model["head"].weight = model["words"].weight
    replace_linears(model, FewRowsLinear)
    assert isinstance(model["head"], FewRowsLinear)
    assert model["head"].weight is model["words"].weight


@pytest.mark.parametrize(
    ("dtype", "deterministic", "kind"),
    [
        (torch.float32, False, FewRowsLinear),
        (torch.float32, True, TiledLinear),
        (torch.bfloat16, False, nn.Linear),
    ],
)
def test_an_engine_on_a_cpu_takes_the_linears_that_suit_it(
    model_dir: Path, plan: Plan, dtype: torch.dtype, deterministic: bool, kind: type[nn.Linear]
) -> None:
    async def use(engine: TransformersEngine) -> Any:
        model: nn.Module = engine._edge._model
        return {type(module) for module in model.modules() if isinstance(module, nn.Linear)}

    assert serve(model_dir, plan, use, [], dtype=dtype, deterministic=deterministic) == {kind}


def _double(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.double()
