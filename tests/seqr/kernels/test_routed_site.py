"""The routed Linears of a GPU mean what ``seqr.routed_linear`` means: same choices, same sums."""

import pytest
import torch
from torch import nn

from seqr.frame import Frame
from seqr.kernels.routed_site import RoutedSite
from seqr.kernels.serving import device_step
from seqr.kernels.step import DeviceStep, DeviceStepMismatch, DeviceStepMissing, running
from seqr.kernels.tables import SiteMismatch, SiteTables
from seqr.library import Library, PermissionRows
from seqr.routed_linear import RoutedLinear
from seqr.routing.evidence import EvidenceState
from seqr.step import Segment, StepContext
from seqr.step import running as running_on_cpu
from tests.seqr.kernels.world import DEVICE
from tests.seqr.strategies import shared_a, toy_library, toy_plan

PLAN = toy_plan([("q", 24, 40), ("k", 24, 16), ("v", 24, 16), ("o", 40, 24)])
A = shared_a(PLAN)
SILOS = [f"silo-{i:02}" for i in range(9)]
LIBRARY = toy_library(PLAN, SILOS)
SITES = ((0, 3), (3, 1))


def tables(library: Library, dtype: torch.dtype = torch.float32) -> list[SiteTables]:
    return [
        SiteTables.of_stacks(
            library.stacks[first : first + size], [s.out_features for s in PLAN.modules[first : first + size]], dtype
        )
        for first, size in SITES
    ]


class Layer:
    """q, k and v of x, then o of q: by RoutedLinear on the CPU, and by two sites."""

    def __init__(self, dtype: torch.dtype = torch.float32, bias: bool = False, **options: bool):
        torch.manual_seed(0)
        linears = [nn.Linear(s.in_features, s.out_features, bias, dtype=dtype) for s in PLAN.modules]
        copies = [nn.Linear(s.in_features, s.out_features, bias, dtype=dtype).to(DEVICE) for s in PLAN.modules]
        for copy, linear in zip(copies, linears, strict=True):
            copy.load_state_dict(linear.state_dict())
        names = [s.name for s in PLAN.modules]
        self.plain = [RoutedLinear(linear, A[names[i]], i) for i, linear in enumerate(linears)]
        self.sites = [
            RoutedSite(
                copies[first : first + size], [A[n] for n in names[first : first + size]], site, first, **options
            )
            for site, (first, size) in enumerate(SITES)
        ]

    def on_cpu(self, x: torch.Tensor, step: StepContext) -> tuple[torch.Tensor, torch.Tensor]:
        with running_on_cpu(step), torch.inference_mode():
            q, k, v = (linear(x) for linear in self.plain[:3])
            out = torch.cat([q, k, v, self.plain[3](q)], dim=-1)
        return out, torch.stack(step.choices).int()

    def on_device(self, x: torch.Tensor, step: DeviceStep) -> tuple[torch.Tensor, torch.Tensor]:
        with running(step), torch.inference_mode():
            together = self.sites[0](x.to(DEVICE))
            out = torch.cat([together, self.sites[1](together[..., :40].contiguous())], dim=-1)
        return out.cpu(), step.chosen.cpu()


def some_x(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, 24, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def steps(
    segments: list[Segment], rows: PermissionRows, tokens: int | None = None, states: list[EvidenceState] | None = None
) -> tuple[StepContext, DeviceStep]:
    one, other = states if states is not None else (None, None)
    return (
        StepContext(rows, segments, one, tokens),
        device_step(rows, segments, tables(rows.library), other, tokens),
    )


def check(layer: Layer, x: torch.Tensor, cpu: StepContext, device: DeviceStep, tolerance: float = 2e-5) -> None:
    expected, choices = layer.on_cpu(x, cpu)
    got, chosen = layer.on_device(x, device)
    assert chosen.tolist() == choices.tolist()
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def new_states() -> list[EvidenceState]:
    return [EvidenceState(4, 4, LIBRARY.columns, LIBRARY.width, d) for d in (torch.device("cpu"), DEVICE)]


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"overlap": True}])
def test_per_token_with_different_users_and_padding(options: dict[str, bool]) -> None:
    rows = PermissionRows(LIBRARY)
    segments = [
        Segment(rows.row_for(SILOS), 0, 5, mode="per_token"),
        Segment(rows.row_for(SILOS[2:4]), 3, 1, mode="per_token"),
        Segment(0, 0, 2, mode="per_token"),
        Segment(rows.row_for(SILOS[5:6]), 0, 3, mode="per_token"),
    ]
    check(Layer(**options), some_x(13), *steps(segments, rows, 13))


def test_evidence_gathered_in_prefill_and_decode_goes_on_alike() -> None:
    rows, states, layer = PermissionRows(LIBRARY), new_states(), Layer()
    row, frame = rows.row_for(SILOS[1:]), Frame(3, range(6, 8))
    check(
        layer, some_x(12),
        *steps([Segment(row, 0, 8, 0, frame=frame), Segment(row, 0, 3, 2)], rows, 12, states),
    )  # fmt: skip
    for state in states:
        state.finish([0, 2])
    check(
        layer, some_x(3),
        *steps([Segment(row, 3, 1, 2), Segment(row, 8, 1, 0, frame=frame)], rows, 3, states),
    )  # fmt: skip
    # The scores differ in their last bits between the two paths, and by then so do the sums, in units of 2^-20.
    assert float((states[0].sums - states[1].sums.cpu()).abs().max()) <= 12 * 16


@pytest.mark.parametrize("length", [1, 6])
def test_three_modes_in_one_batch(length: int) -> None:
    rows, states = PermissionRows(LIBRARY), new_states()
    row = rows.row_for(SILOS)
    for state in states:
        state.sums[:, 1, : len(SILOS)] = torch.arange(len(SILOS)).double() * 2.0**20
    standing = states[0].standing(1, set(LIBRARY.columns))
    segments = [
        Segment(row, 0, length, mode="per_token"),
        Segment(row, 0, length, 0, mode="evidence"),
        Segment(row, 4, 2, mode="prompt_evidence", standing=standing),
    ]
    cpu, device = steps(segments, rows, 2 * length + 3, states)
    assert device.batch.settled.tolist()[2 * length :] == [8, 8, -1]
    check(Layer(), some_x(2 * length + 3), cpu, device)


def test_a_settled_choice_scores_nothing_and_a_pass_that_only_reads_adds_nothing() -> None:
    rows, states, layer = PermissionRows(LIBRARY), new_states(), Layer()
    read = [Segment(0, 0, 7, 1)]
    cpu, device = steps(read, rows, 7, states)
    assert device.nobody
    check(layer, some_x(7), cpu, device)
    standing = states[0].standing(1, set(LIBRARY.columns))
    settled = [Segment(rows.row_for(SILOS), 7, 3, mode="prompt_evidence", standing=standing)]
    cpu, device = steps(settled, rows)
    device.tables = [
        SiteTables.of(torch.full_like(t.gram, torch.nan), t.offset, t.b_t, t.outputs) for t in device.tables
    ]
    check(layer, some_x(3), cpu, device)


def test_tokens_in_groups_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqr.kernels.routed_site.GATHER_TOKENS", 16)
    monkeypatch.setattr("seqr.kernels.expand.GROUP_COLUMNS", 16)
    rows = PermissionRows(LIBRARY)
    segments = [Segment(rows.row_for(SILOS), 0, 40, mode="per_token"), Segment(0, 0, 5, mode="per_token")]
    check(Layer(), some_x(47), *steps(segments, rows, 47))


def test_a_stacked_under_w_means_the_same() -> None:
    rows = PermissionRows(LIBRARY)
    x, layers = some_x(9, torch.bfloat16), [Layer(torch.bfloat16), Layer(torch.bfloat16, stacked=True)]
    segments = [Segment(rows.row_for(SILOS), 0, 8, mode="per_token")]
    for layer in layers:
        cpu, device = steps(segments, rows, 9)
        expected, _ = layer.on_cpu(x, cpu)
        got, _ = layer.on_device(x, device)
        # o reads q, which is rounded to bf16 in one case before and in the other after the share was added.
        torch.testing.assert_close(got[:, :72].float(), expected[:, :72].float(), rtol=2**-7, atol=2**-7)


def test_a_step_can_be_copied_in_and_run_again() -> None:
    rows, layer = PermissionRows(LIBRARY), Layer()
    both = rows.row_for(SILOS), rows.row_for(SILOS[:2])
    first = [Segment(both[0], 0, 4, mode="per_token")]
    second = [Segment(both[1], 0, 3, mode="per_token"), Segment(0, 0, 1, mode="per_token")]
    # Rows are numbered before the tables are packed, so that both steps have the same table.
    (_, device), (cpu, other) = steps(first, rows), steps(second, rows)
    layer.on_device(some_x(4), device)
    device.batch.copy_(other.batch)
    check(layer, some_x(4), cpu, device)


def test_stand_ins_give_each_module_its_part() -> None:
    rows, layer = PermissionRows(LIBRARY), Layer()
    _, step = steps([Segment(rows.row_for(SILOS), 0, 4, mode="per_token")], rows)
    x = some_x(4).to(DEVICE)
    with running(step), torch.inference_mode():
        whole = layer.sites[0](x)
        parts = layer.sites[0].parts()
        assert torch.equal(torch.cat([part(x) for part in parts], dim=-1), whole)
        with pytest.raises(SiteMismatch):
            parts[1](x)
        parts[0](x)
        with pytest.raises(SiteMismatch):
            parts[1](x.clone())


def test_a_site_never_guesses() -> None:
    rows, layer = PermissionRows(LIBRARY), Layer()
    with pytest.raises(DeviceStepMissing):
        layer.sites[0](some_x(4))
    _, step = steps([Segment(0, 0, 3, mode="per_token")], rows)
    with running(step), pytest.raises(DeviceStepMismatch):
        layer.sites[0](some_x(4))
    with pytest.raises(DeviceStepMismatch):
        device_step(rows, [Segment(0, 0, 3)], tables(LIBRARY))
    with pytest.raises(DeviceStepMismatch):
        device_step(rows, [Segment(0, 0, 3, mode="per_token")], tables(LIBRARY), tokens=2)
    with pytest.raises(SiteMismatch):
        RoutedSite([nn.Linear(8, 8), nn.Linear(9, 8)], [torch.zeros(2, 8), torch.zeros(2, 9)], 0, 0)
