"""Every kernel against fp64 on fresh random numbers, and the promises about bits that only a card can break."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu.adapters import blocks_of, random_permissions, random_r
from seqr.kernels.candidates import Candidates
from seqr.kernels.evidence_decode import route_evidence
from seqr.kernels.evidence_prefill import Chunks, route_evidence_runs
from seqr.kernels.expand import expand_groups, expand_tokens
from seqr.kernels.group import group
from seqr.kernels.project import Projection, project
from seqr.kernels.route import route_tokens
from seqr.kernels.stacked import stack_weight, stacked_product
from seqr.kernels.tables import SiteTables

UNIT = 2.0**-24


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Sizes:
    inputs: int
    outputs: tuple[int, ...]
    adapters: int
    tokens: int
    many: int


ON_CARD = Sizes(4096, (4096, 1024, 1024), 1000, 64, 2048)
TINY = Sizes(96, (24, 8, 8), 70, 2, 9)


def all_checks(device: torch.device, interpret: bool) -> Iterator[Check]:
    sizes = TINY if interpret else ON_CARD
    yield from _project(sizes, device)
    for rank in (4,) if interpret else (8, 16, 32):
        yield from _route(sizes, rank, device)
    yield from _evidence(sizes, 4 if interpret else 16, device)
    for dtype in (torch.bfloat16, torch.float32):
        yield from _expand(sizes, 4 if interpret else 16, dtype, device)


def _project(s: Sizes, device: torch.device) -> Iterator[Check]:
    x = torch.randn(s.many, s.inputs, dtype=torch.bfloat16, device=device)
    a = torch.randn(48, s.inputs, device=device) / s.inputs**0.5
    exact, size = x.double() @ a.double().T, x.double().abs() @ a.double().abs().T
    weight = Projection.of(a)
    whole, bound = project(x, weight, False), (3 * s.inputs + 32) * 2 * UNIT
    error = (whole[0].double() - exact).abs()
    yield Check(
        "z: within its bound", bool((error <= bound * size).all()), f"{_relative(whole[0], exact):.1e} relative"
    )
    _, z = stacked_product(x, stack_weight(torch.zeros(16, s.inputs, dtype=torch.bfloat16, device=device), a), 48)
    z, bound = z.double().sum(0), (s.inputs + 3) * 2 * UNIT
    # The library adds n / 16 products of 16 terms to one running sum, each cut off at 2^-23 of it: on random x, whose
    # sum grows, that is the most the norm can be off. A z that had been bf16 on its way would be off by 1e-3.
    off, most = _relative(z, exact), s.inputs / 16 * 2 * UNIT
    fine = off < most and bool(((z - exact).abs() <= bound * size).all())
    yield Check("z stacked under W", fine, f"{off:.1e} relative, at most {most:.1e}")
    same = True
    cuts = [(0, 1), (0, s.tokens)]
    if device.type == "cuda":
        # Elsewhere in a tile, too; the interpreter's matmul is a BLAS, whose bits depend on a row's place.
        cuts += [(3, 3 + s.tokens // 2), (s.many - s.tokens, s.many)]
    for start, end in cuts:
        parts = project(x[start:end].contiguous(), weight, True)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        same &= torch.equal(total, whole[0, start:end])
    yield Check("z: same bits in every batch", same, "decode's parts added up, and prefill")


def _route(s: Sizes, rank: int, device: torch.device) -> Iterator[Check]:
    r = random_r(1, s.adapters, rank, device)
    width = 64 * -(-s.adapters // 64)
    gram, offset, sigma = blocks_of(r, width)
    tables = SiteTables.of(gram, offset, torch.zeros(s.adapters, rank, 64, device=device), (64,))
    bits, row = random_permissions(s.adapters, width, s.many, device)
    table = (bits[:, torch.arange(width, device=device) // 32] >> (torch.arange(width, device=device) % 32)) & 1
    for tokens in (s.tokens, s.many):
        z = torch.randn(1, tokens, rank, device=device)
        choice = route_tokens(z, tables, bits, row[:tokens])[0].choice()[0].long()
        again = route_tokens(z, tables, bits, row[:tokens])[0].choice()[0].long()
        wide = (r[0].double() @ z[0].double().T).square().sum(1).sqrt().T
        score = wide / sigma[0, : s.adapters].double() - offset[0, : s.adapters].double()
        score = score.masked_fill(table[row[:tokens].long(), : s.adapters] == 0, -torch.inf)
        best = score.max(1)
        chosen = score.gather(1, choice[:, None])[:, 0]
        # d / sqrt(q) of reference_score_error, with S at most 2 (sum |R_ij|)^2 |z|^2: generous, and seldom needed.
        slack = 1e-4 * best.values.abs().clamp_min(1.0)
        wrong = int((choice != best.indices).sum())
        fine = bool((best.values - chosen <= slack).all()) and wrong <= tokens // 500 and torch.equal(choice, again)
        yield Check(f"route r={rank} T={tokens} N={s.adapters}", fine, f"{wrong} of {tokens} differ from fp64's argmax")


def _evidence(s: Sizes, rank: int, device: torch.device) -> Iterator[Check]:
    modules, width = 3, 64 * -(-s.adapters // 64)
    gram, offset, _ = blocks_of(random_r(modules, s.adapters, rank, device), width)
    tables = SiteTables.of(gram, offset, torch.zeros(s.adapters, rank, 48, device=device), (16, 16, 16))
    tokens, counts = s.tokens, torch.ones(s.tokens, dtype=torch.int8, device=device)
    z = torch.randn(1, tokens, modules * rank, device=device)
    bits, row = random_permissions(s.adapters, width, tokens, device)
    zero = torch.zeros(modules, 2, width, dtype=torch.float64, device=device)
    value = torch.full((tokens, width), torch.nan, dtype=torch.float64, device=device)
    ran = zero.clone()
    chunks = Chunks.of([tokens], [0], device)
    whole = route_evidence_runs(z, tables, bits, row, chunks, counts, ran, value, True).choice()
    stepped, choices = zero.clone(), []
    slot = torch.zeros(1, dtype=torch.int32, device=device)
    for t in range(tokens):
        found, _ = route_evidence(
            z[:, t : t + 1], tables, bits, row[t : t + 1], slot, counts[:1], stepped, value[:1], True
        )  # fmt: skip
        choices.append(found.choice())
    same = torch.equal(ran, stepped) and torch.equal(torch.cat(choices, 1), whole)
    off = float((ran - stepped).abs().max())
    yield Check("evidence: prefill = decode bit for bit", same, f"largest difference {off:.0f} units")
    units = torch.zeros(modules, width, dtype=torch.float64, device=device)
    first, second = torch.triu_indices(rank, rank, device=device)
    for m in range(modules):
        own = z[0, :, m * rank : (m + 1) * rank].double()
        columns = gram[m].transpose(0, 1).reshape(gram.shape[2], width).double()
        square = (own[:, first] * own[:, second]) @ columns
        score = square.clamp_min(0.0).sqrt() - offset[m].double()
        units[m] = (score.clamp(-6.0, 6.0) * 2.0**20).round().sum(0)
    off = float((ran[:, 0] - units).abs().max()) / tokens
    yield Check(
        "evidence: sums against fp64", off < 64.0 and bool((ran[:, 1] == 0).all()), f"{off:.2f} units per token"
    )


def _expand(s: Sizes, rank: int, dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    modules, wide = len(s.outputs), sum(s.outputs)
    gram, offset, _ = blocks_of(random_r(modules, 64, rank, device), 64)
    b_t = torch.randn(s.adapters, rank, wide, device=device).to(dtype)
    tables = SiteTables.of(gram, offset, b_t, s.outputs)
    popularity = {
        "distinct": torch.arange(s.many) % s.adapters,
        "uniform": torch.randint(-1, s.adapters, (s.many,)),
        "zipf": (1.0 / torch.rand(s.many)).long().clamp_max(s.adapters) - 1,
        "same": torch.full((s.many,), 3),
    }
    for name, chosen in popularity.items():
        choice = torch.stack([chosen.roll(m) for m in range(modules)]).to(torch.int32).to(device)
        z = torch.randn(1, s.many, modules * rank, device=device)
        y = torch.randn(s.many, wide, dtype=torch.bfloat16, device=device)
        exact, start = y.double(), 0
        for m, width in enumerate(s.outputs):
            own = b_t[:, :, start : start + width].double()[choice[m].clamp_min(0).long()]
            share = torch.einsum("tk,tko->to", z[0, :, m * rank : (m + 1) * rank].double(), own)
            exact[:, start : start + width] += share * (choice[m] >= 0)[:, None]
            start += width
        grouped, direct = y.clone(), y.clone()
        expand_groups(grouped, z, tables, group(choice, s.adapters))
        column = choice[:, :, None].contiguous()
        expand_tokens(direct, z, tables, Candidates(column, column))
        off = max(_relative(grouped, exact), _relative(direct, exact))
        yield Check(f"expand {str(dtype)[6:]} {name}", off < 3e-3, f"{off:.1e} relative, y in bf16")


def _relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    value = float((got.double() - exact).norm() / exact.norm())
    return value if value == value else float("inf")
