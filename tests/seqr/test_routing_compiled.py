"""The compiled passes are what torch does without Numba: the same choices, and the same evidence to the last bit."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from seqr.bench.routing.adversary import assorted
from seqr.routed_linear import add_rows
from seqr.routing import compiled, evidence, per_token
from seqr.routing.evidence import EvidencePass, EvidenceState, Spans
from seqr.routing.features import feature_count, features
from seqr.routing.per_token import Columns, Gate, route_activations
from seqr.routing.products import block_product


def torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (per_token, evidence):
        monkeypatch.setattr(module, "compiled", None)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 130])
@pytest.mark.parametrize("count", [1, 64, 65, 300])
@pytest.mark.parametrize("exact", [True, False])
def test_per_token_choices_are_torchs(monkeypatch: pytest.MonkeyPatch, tokens: int, count: int, exact: bool) -> None:
    generator = torch.Generator().manual_seed(tokens * count)
    shelf = assorted(8, count, 1e2, generator)
    z = torch.randn(tokens, 8, generator=generator)
    z[::7] *= 1e30  # squares overflow: no score is a number
    permitted = torch.rand(tokens, shelf.columns.offset.shape[0], generator=generator) < 0.7
    permitted[:, count:] = False
    permitted[tokens // 2] = False
    gate, truth = Gate(permitted), shelf.truth if exact else None
    mine = route_activations(z, shelf.columns, gate, truth)
    torchs(monkeypatch)
    assert torch.equal(mine, route_activations(z, shelf.columns, gate, truth))
    assert int(mine[tokens // 2]) == -1


def test_of_adapters_that_score_the_same_the_lowest_permitted_column_is_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = Columns(torch.ones(5, feature_count(4), 64), torch.zeros(320))
    permitted = torch.rand(40, 320, generator=generator) < torch.rand(40, 1, generator=generator) ** 4
    permitted[:, 0] = False
    column = route_activations(torch.randn(40, 4, generator=generator), columns, Gate(permitted))
    lowest = torch.where(permitted.any(1), permitted.to(torch.int8).argmax(1), -1)
    assert torch.equal(column, lowest)
    assert len(set(lowest.tolist())) > 10


def test_evidence_and_its_choices_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the last place of a root, which torch does not round correctly: scores on a grid too coarse to show it."""
    generator = torch.Generator().manual_seed(0)
    shelf = assorted(8, 70, 1.0, generator)
    lengths = torch.tensor([5, 1, 30, 4])
    last = lengths.cumsum(0) - 1
    run_of = torch.arange(4).repeat_interleave(lengths)
    weights = (torch.rand(40, generator=generator) < 0.8).float() * 2.0**-12
    spans = Spans(torch.tensor([2, 0, 1, 3]), last - lengths + 1, last, run_of, weights)
    permitted = torch.rand(40, 128, generator=generator) < 0.7
    permitted[:, 70:] = False
    permitted[3] = False
    gate, zs = Gate(permitted), torch.randn(3, 40, 8, generator=generator)

    def gathered() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        state = EvidenceState(3, 3, (), 128)
        a_pass = EvidencePass(state, spans)
        columns = [a_pass.route_activations(module, z, shelf.columns, gate) for module, z in enumerate(zs)]
        return torch.stack(columns), state.sums, a_pass.value_at(permitted.any(1).nonzero().squeeze(1))

    mine = gathered()
    torchs(monkeypatch)
    theirs = gathered()
    assert torch.equal(mine[0], theirs[0])
    assert float(mine[1].abs().max()) > 100
    for one, other in zip(mine[1:], theirs[1:], strict=True):
        assert float((one - other).abs().max()) <= 1.0  # of 2^-20


@pytest.mark.parametrize("modules", [1, 3])
def test_features_and_scores_are_torchs_bit_for_bit(modules: int) -> None:
    generator = torch.Generator().manual_seed(0)
    z, blocks = torch.randn(modules, 19, 8, generator=generator), torch.randn(modules, 3, 36, 64, generator=generator)
    room = torch.zeros(modules, 32, 36)
    product = compiled.score_product(z, blocks, room)
    for module in range(modules):
        assert torch.equal(room[module, :19], features(z[module])) and not bool(room[module, 19:].any())
        assert np.array_equal(product[module], block_product(features(z[module]), blocks[module]).numpy())


@pytest.mark.parametrize("outputs", [1, 7, 576])
@pytest.mark.parametrize("rank", [1, 3, 4, 16])
def test_what_an_adapter_adds_has_the_same_bits_in_any_batch(rank: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    b_t = [torch.randn(rank, outputs, generator=generator) for _ in range(3)]
    where = np.array([b.data_ptr() for b in b_t])
    y, z = torch.randn(33, outputs, generator=generator), torch.randn(33, rank, generator=generator)
    column = torch.randint(-1, 3, (33,), generator=generator)
    together = y.clone()
    compiled.add_rows(together.numpy(), z.numpy(), where, column.numpy())
    for t in range(33):
        alone = y[t : t + 1].clone()
        compiled.add_rows(alone.numpy(), z[t : t + 1].numpy(), where, column[t : t + 1].numpy())
        assert torch.equal(alone[0], together[t])
        share = z[t].double() @ b_t[int(column[t])].double() if column[t] >= 0 else torch.zeros(outputs).double()
        torch.testing.assert_close(together[t].double(), y[t].double() + share, rtol=1e-5, atol=1e-5)


WITHOUT_NUMBA = """
import sys
from typing import Any
sys.modules["numba"] = None
from seqr import routed_linear
from seqr.routing import evidence, per_token
assert per_token.compiled is None and evidence.compiled is None and routed_linear.compiled is None
"""

NOWHERE_TO_KEEP = """
import numba.core.caching as caching
class Nowhere(caching.FunctionCache):
    def __init__(self, function):
        raise RuntimeError("cannot cache function: no locator available")
import numba.core.dispatcher as dispatcher
dispatcher.FunctionCache = Nowhere
import numpy as np
from seqr.routing import compiled
out = np.zeros((1, 3), np.float32)
compiled.features(np.array([[[2.0, 3.0]]], np.float32), out[None])
assert out.tolist() == [[4.0, 6.0, 9.0]]
"""


@pytest.mark.parametrize("script", [WITHOUT_NUMBA, NOWHERE_TO_KEEP], ids=["without Numba", "nowhere to keep the code"])
def test_a_process_routes(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_compile_now_leaves_nothing_to_compile_for_the_first_answer() -> None:
    compiled.compile_now()
    passes: list[Any] = [compiled.features, compiled.choose_per_token, compiled.gather_evidence, compiled.add_rows]
    before = [len(one.signatures) for one in passes]
    shelf = assorted(8, 3, 1.0, torch.Generator().manual_seed(0))
    z, gate = torch.randn(5, 8), Gate(torch.ones(5, 64, dtype=torch.bool))
    route_activations(z, shelf.columns, gate, shelf.truth)
    route_activations(z, shelf.columns, gate)
    runs = torch.arange(5)
    a_pass = EvidencePass(EvidenceState(1, 4, (), 64), Spans(runs, runs, runs, runs, torch.ones(5)))
    a_pass.route_activations(0, z, shelf.columns, gate)
    b_t, column = torch.randn(8, 7), torch.zeros(5, dtype=torch.int64)
    add_rows(torch.randn(5, 7), z, np.array([b_t.data_ptr()]), column)
    assert [len(one.signatures) for one in passes] == before
