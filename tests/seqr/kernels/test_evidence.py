"""Accumulated evidence on the device: the sums, values and choices of ``seqr.routing.evidence``, bit for bit."""

import math

import pytest
import torch

from seqr.kernels.candidates import Candidates
from seqr.kernels.evidence_decode import route_evidence
from seqr.kernels.evidence_prefill import Chunks, route_evidence_runs
from seqr.routing.evidence import EvidencePass, EvidenceState, Spans
from seqr.routing.features import features
from seqr.routing.products import score_product
from seqr.routing.reference import reference_choice, reference_evidence
from seqr.routing.scores import choose, usable
from tests.seqr.kernels.world import DEVICE, World, random_world, rows_for, tables_of

# Squared norms of whole numbers are exact in fp32, so that the CPU's bits can be asked for.
MODULES, ADAPTERS, SLOTS, TOKENS = 3, 70, 6, 29
WORLD = random_world(tokens=TOKENS, adapters=ADAPTERS, rank=4, outputs=(8, 8, 8), whole=True, seed=3)


def cpu_pass(
    world: World,
    lengths: list[int],
    slots: list[int],
    counts: torch.Tensor,
    sums: torch.Tensor,
    permitted: torch.Tensor,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Choice per module and the last value, by the CPU path; ``sums`` [M, slots + 1, N] is updated."""
    state = EvidenceState(MODULES, SLOTS, (), world.tables.adapters)
    state.sums = sums
    last = torch.tensor(lengths).cumsum(0) - 1
    first = last - torch.tensor(lengths) + 1
    spans = Spans(torch.tensor(slots), first, last, torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
                  counts.float())  # fmt: skip
    a_pass, choices, value = EvidencePass(state, spans), [], sums
    for module in range(MODULES):
        z = world.z[:, module * world.rank : (module + 1) * world.rank].cpu().contiguous()
        square = score_product(features(z), world.tables.gram[module].cpu())
        # torch's own fp32 square root may be off by one in the last bit.
        score = square.double().sqrt().float() - world.tables.offset[module].cpu()
        value = a_pass.value(module, score)
        choices.append(choose(value, permitted & usable(score)))
    return choices, value


def permissions(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    sets = [torch.nonzero(torch.rand(ADAPTERS, generator=g) < 0.4).flatten().tolist() for _ in range(tokens)]
    table, bits, row = rows_for(sets, WORLD.tables)
    return table[1:], bits, row


def split(world: World, sites: list[int]) -> list[tuple[slice, World]]:
    """The world's modules as sites of so many modules each."""
    out, start = [], 0
    for size in sites:
        own = slice(start, start + size)
        r, mu, sigma, b = world.r[own], world.mu[own], world.sigma[own], world.b[own]
        z = world.z[:, own.start * world.rank : own.stop * world.rank]
        out.append((own, World(r, mu, sigma, b, z, tables_of(r, mu, sigma, b, torch.float32))))
        start += size
    return out


def device_pass(
    world: World, sites: list[int], lengths: list[int], slots: list[int], counts: torch.Tensor, sums: torch.Tensor,
    bits: torch.Tensor, row: torch.Tensor, size: int | None,
) -> tuple[list[torch.Tensor], torch.Tensor]:  # fmt: skip
    """The same by the kernels: one token per sequence when ``size`` is None, else in chunks of ``size``."""
    value = torch.full((sum(lengths), world.tables.adapters), math.nan, dtype=torch.float64, device=DEVICE)
    choices: list[torch.Tensor] = []
    for number, (own, site) in enumerate(split(world, sites)):
        found: Candidates
        if size is None:
            slot = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
            found, _ = route_evidence(
                site.z[None], site.tables, bits, row, slot, counts, sums[own], value, number == 0
            )  # fmt: skip
        else:
            chunks = Chunks.of(lengths, slots, DEVICE, size)
            found = route_evidence_runs(
                site.z.contiguous()[None], site.tables, bits, row, chunks, counts, sums[own], value, number == 0, size
            )
        choices += [*found.choice().cpu().long()]
    return choices, value


@pytest.mark.parametrize("sites", [[3], [1, 2]])
def test_decode_gives_the_bits_of_the_cpu_path(sites: list[int]) -> None:
    world = World(WORLD.r, WORLD.mu, WORLD.sigma, WORLD.b, WORLD.z[:20], WORLD.tables)
    # Slots in use, then padding in the spare slot.
    slots = [4, 0, 5, 2, 1, *[SLOTS] * 15]
    counts = torch.tensor([1, 1, 0, 1, 1, *[0] * 15], dtype=torch.int8)
    sums = torch.randint(-(2**40), 2**40, (MODULES, SLOTS + 1, WORLD.tables.adapters)).double()
    sums[:, SLOTS] = 0.0
    table, bits, row = permissions(20, 1)
    ours = sums.clone().to(DEVICE)
    expected, value = cpu_pass(world, [1] * 20, slots, counts, sums, table)
    got, got_value = device_pass(world, sites, [1] * 20, slots, counts.to(DEVICE), ours, bits, row, None)
    assert torch.equal(ours.cpu(), sums) and torch.equal(got_value.cpu(), value)
    assert [c.tolist() for c in got] == [c.tolist() for c in expected]


@pytest.mark.parametrize(("size", "sites"), [(8, [3]), (16, [1, 2])])
@pytest.mark.parametrize("lengths", [[29], [1, 12, 3, 9, 4], [8, 16, 5]])
def test_prefill_gives_the_bits_of_the_cpu_path(lengths: list[int], size: int, sites: list[int]) -> None:
    slots = [4, 0, 5, 2, SLOTS][: len(lengths)]
    counts = (torch.rand(TOKENS, generator=torch.Generator().manual_seed(5)) < 0.8).to(torch.int8)
    if slots[-1] == SLOTS:
        counts[TOKENS - lengths[-1] :] = 0
    sums = torch.randint(-(2**40), 2**40, (MODULES, SLOTS + 1, WORLD.tables.adapters)).double()
    sums[:, SLOTS] = 0.0
    table, bits, row = permissions(TOKENS, 2)
    ours = sums.clone().to(DEVICE)
    expected, value = cpu_pass(WORLD, lengths, slots, counts, sums, table)
    got, got_value = device_pass(WORLD, sites, lengths, slots, counts.to(DEVICE), ours, bits, row, size)
    assert torch.equal(ours.cpu(), sums) and torch.equal(got_value.cpu(), value)
    assert [c.tolist() for c in got] == [c.tolist() for c in expected]


def test_any_cutting_of_a_sequence_gives_the_bits_of_one_prefill() -> None:
    _, bits, row = permissions(TOKENS, 3)
    counts = torch.ones(TOKENS, dtype=torch.int8, device=DEVICE)
    shape = (MODULES, SLOTS + 1, WORLD.tables.adapters)
    whole_sums = torch.zeros(shape, dtype=torch.float64, device=DEVICE)
    whole, _ = device_pass(WORLD, [3], [TOKENS], [2], counts, whole_sums, bits, row, 16)
    for cuts in ([10, 19], [1, 25] + [1] * 3):
        sums, choices, start = torch.zeros_like(whole_sums), [], 0
        for length in cuts:
            own = slice(start, start + length)
            part = World(WORLD.r, WORLD.mu, WORLD.sigma, WORLD.b, WORLD.z[own], WORLD.tables)
            size = None if length == 1 else 16
            got, _ = device_pass(part, [3], [length], [2], counts[own], sums, bits, row[own], size)
            choices.append(torch.stack(got))
            start += length
        assert torch.equal(torch.cat(choices, dim=1), torch.stack(whole)) and torch.equal(sums, whole_sums)


def test_values_are_those_of_the_reference() -> None:
    world = World(WORLD.r, WORLD.mu, WORLD.sigma.clone(), WORLD.b, WORLD.z[:9], WORLD.tables)
    world.sigma[1, 4] = 0.0
    world.tables = tables_of(world.r, world.mu, world.sigma, world.b, torch.float32)
    sets = [[*range(ADAPTERS)]] * 9
    table, bits, row = rows_for(sets, world.tables)
    counts = torch.tensor([0, *[1] * 8], dtype=torch.int8, device=DEVICE)
    sums = torch.zeros(MODULES, SLOTS + 1, world.tables.adapters, dtype=torch.float64, device=DEVICE)
    got, _ = device_pass(world, [3], [9], [0], counts, sums, bits, row, 16)
    expected = reference_evidence([[world.scores(m, t) for t in range(9)] for m in range(MODULES)])
    for module in range(MODULES):
        for token in range(1, 9):
            choice, values = int(got[module][token]), expected[module][token]
            best = reference_choice(values, table[token + 1].tolist()[:ADAPTERS])
            # Each of the scores behind a value was rounded to a multiple of 2^-20 once.
            assert choice == best or values[best] - values[choice] <= MODULES * 2.0**-20, (module, token)
            assert (module, choice) != (1, 4)
