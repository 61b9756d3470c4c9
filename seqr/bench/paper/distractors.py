"""Prompt evidence in a library that grows by adapters that nobody here trained (LORAUTER goes to some 1,500).

There are not 1,500 adapters to be had for a small base model, so these are made: each takes a real adapter and turns
it by a random orthogonal matrix in every module, B' = B O. It keeps every singular value, so it is as loud as the real
ones and calibrates as they do, but listens to other directions of the shared space.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from seqr.bench.paper.evidence_study import RULES, Variant
from seqr.bench.paper.measuring import Measuring
from seqr.bench.paper.reading import look_at
from seqr.bench.paper.routed import with_columns
from seqr.public_text import public_texts
from seqr.routers.pool import AdapterPool, LoraFactors
from seqr.routing.features import features, gram
from seqr.routing.scores import CLIP

STEPS = (0, 10, 50, 150, 500)
ROWS = 50  # test rows per task


def turns(module: int, rank: int, count: int) -> torch.Tensor:
    """The orthogonal matrices of all distractors in one module: fp64 [count, r, r], uniform, the same for the same
    count."""
    dice = torch.Generator("cpu").manual_seed(module)
    q, r = torch.linalg.qr(torch.randn(count, rank, rank, generator=dice, dtype=torch.float64, device="cpu"))
    signs: torch.Tensor = r.diagonal(dim1=1, dim2=2).sign()
    turned: torch.Tensor = q * signs[:, None, :]
    return turned.to(torch.get_default_device())


def distractors(pool: AdapterPool, numbers: Sequence[int], count: int) -> AdapterPool:
    """Some of ``count`` distractors of a pool that shares A, as a pool of their own."""
    made: dict[str, dict[str, LoraFactors]] = {f"distractor-{number}": {} for number in numbers}
    for m, module in enumerate(pool.modules):
        turned = turns(m, pool.a[m].shape[0], count)
        for number in numbers:
            b = pool.b_t[m][number % len(pool)].T.double() @ turned[number]
            made[f"distractor-{number}"][module] = LoraFactors(pool.a[m], b.float())
    return AdapterPool(made, pool.modules)


def growing_evidence(
    pool: AdapterPool,
    public: torch.Tensor,
    prompts: torch.Tensor,
    row: torch.Tensor,
    count: int,
    rules: Mapping[str, Variant],
) -> dict[str, torch.Tensor]:
    """Every rule's evidence of every prompt for the pool and ``count`` distractors: fp64 [S, N + count].

    public fp32 [P, M, r] and prompts fp32 [T, M, r]: z = A x on the base model's hidden states; row int64 [T]. Of a
    rule, its sites and its words count; the statistic is the norm and the clip the product's.
    """
    shape = (int(row.max()) + 1, len(pool) + count)
    total = {rule: torch.zeros(shape, dtype=torch.float64) for rule in rules}
    sites = {rule: set(variant.modules(len(pool.modules)).tolist()) for rule, variant in rules.items()}
    weights = {rule: variant.weights(row) for rule, variant in rules.items()}
    chunks = torch.split(torch.arange(len(row)), 4096)
    # Of a chunk, the prompts it has words of, and how much each word counts for each of them.
    present = [slice(int(row[words[0]]), int(row[words[-1]]) + 1) for words in chunks]
    counts = {
        rule: [
            w[words] * (row[words] == torch.arange(prompt.start, prompt.stop)[:, None])
            for words, prompt in zip(chunks, present, strict=True)
        ]
        for rule, w in weights.items()
    }
    for m in range(len(pool.modules)):
        own = torch.linalg.qr(pool.b_t[m].transpose(1, 2).double()).R
        turned = own[torch.arange(count) % len(pool)] @ turns(m, pool.a[m].shape[0], count)
        grams = gram(torch.cat([own, turned])).to(public.device, torch.float32).T.contiguous()
        calibration = (features(public[:, m]) @ grams).clamp_min(0).sqrt()
        mu, sigma = calibration.mean(0), calibration.std(0, correction=0)
        for c, (words, prompt) in enumerate(zip(chunks, present, strict=True)):
            norms = (features(prompts[words, m]) @ grams).clamp_min_(0).sqrt_()
            score = norms.sub_(mu).div_(sigma).clamp_(-CLIP, CLIP).double()
            for rule in rules:
                if m in sites[rule]:
                    total[rule][prompt] += counts[rule][c] @ score
    spoken = {rule: torch.zeros(shape[0], dtype=torch.float64).index_add_(0, row, w) for rule, w in weights.items()}
    return {rule: summed / spoken[rule][:, None] / len(sites[rule]) for rule, summed in total.items()}


def distractor_study(measuring: Measuring, seed: int) -> dict[str, Any]:
    """Own-adapter share and accuracy of prompt evidence by every rule and by how many distractors there are; right per
    row and task."""
    bench, rows = measuring.bench, ROWS
    count = bench.settings.distractors
    sizes = [*(step for step in STEPS if step < count), count]
    pool = bench.pool(seed)
    texts = [bench.tokenizer(text)["input_ids"] for text in public_texts()]
    public, _ = look_at(bench.model, pool, texts, bench.pad_token, lambda a: a.z)
    examples = [(own, e) for own, task in enumerate(bench.settings.tasks) for e in bench.test_examples(task)[:rows]]
    prompts, row = look_at(bench.model, pool, [e.prompt for _, e in examples], bench.pad_token, lambda a: a.z)
    evidence = growing_evidence(pool, public, prompts, row, count, RULES)
    out: dict[str, Any] = {"rows": rows, "sizes": sizes, "rules": list(RULES), "tasks": {}}
    for own, task in enumerate(bench.settings.tasks):
        mine = [index for index, (column, _) in enumerate(examples) if column == own]
        columns = {
            (rule, size): value[mine, : len(pool) + size].argmax(1).tolist()
            for rule, value in evidence.items()
            for size in sizes
        }
        # A distractor that wins in a small library often wins in a larger one: it answers once.
        pairs = sorted({(row, column) for found in columns.values() for row, column in enumerate(found)})
        answers = dict(zip(pairs, _answers(measuring, seed, task, pairs), strict=True))
        entry: dict[str, dict[str, Any]] = {rule: {} for rule in RULES}
        for (rule, size), found in columns.items():
            right = [int(answers[row, column] == examples[mine[row]][1].gold) for row, column in enumerate(found)]
            entry[rule][str(size)] = {"right": right, "share": sum(column == own for column in found) / len(found)}
        out["tasks"][task] = entry
    return out


def _answers(measuring: Measuring, seed: int, task: str, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """The answer of each (row, column): a column of the pool, or a distractor from the pool's size on."""
    bench = measuring.bench
    pool, examples = bench.pool(seed), bench.test_examples(task)
    known: dict[tuple[int, int], int] = {}
    for column in {column for _, column in pairs if column < len(pool)}:
        rows = {row for row, other in pairs if other == column}
        own = bench.settings.tasks.index(task)
        answered = measuring.given(task, seed, [column if row in rows else own for row in range(len(examples))])
        known |= {(row, column): answered[row] for row in rows}
    outside = [(row, column - len(pool)) for row, column in pairs if column >= len(pool)]
    if outside:
        numbers = sorted({number for _, number in outside})
        made = distractors(pool, numbers, bench.settings.distractors)
        given = [examples[row] for row, _ in outside]
        chosen = [numbers.index(number) for _, number in outside]
        found = with_columns(bench.model, made, given, chosen, bench.pad_token)
        known |= {(row, number + len(pool)): answer for (row, number), answer in zip(outside, found, strict=True)}
    return [known[pair] for pair in pairs]
