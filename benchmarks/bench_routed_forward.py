"""The routed forward pass against the bare one, interleaved in one process: the shape of a 135M Llama, random weights.

    python benchmarks/bench_routed_forward.py --dtype bfloat16 --threads 2 --tokens 16 --silos 3 --rank 16

Decode of ``--tokens`` sequences, one token each, or with ``--prefill`` one sequence of as many tokens; all Linears are
routed. With one thread the time is CPU time, so that other processes disturb it less; with more it is wall time.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from seqr.adapter import Adapter, ModuleAdapter
from seqr.factorize import factorize
from seqr.library import Library, PermissionRows
from seqr.models import linear_module_names
from seqr.plan import Plan, TrainingLimits
from seqr.routed_linear import adapt_model
from seqr.routing.evidence import EvidenceState
from seqr.shared_a import draw_a
from seqr.step import Segment, StepContext, running


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--silos", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--prefill", action="store_true")
    return parser.parse_args()


def plan_for(model: torch.nn.Module, rank: int) -> Plan:
    return Plan(
        plan_id="bench", federation="bench", base_model="random", base_model_digest="", modules=tuple(
            linear_module_names(model, "all")
        ), rank=rank, alpha=2.0 * rank, seed=0, dtype="float32", a_digests={}, gateway_keys=(), routing="evidence",
        calibration="own", training=TrainingLimits(), created_at="",
    )  # fmt: skip


def random_adapter(plan: Plan) -> Adapter:
    modules = {}
    for spec in plan.modules:
        q, r = factorize(torch.randn(spec.out_features, plan.rank) * 0.01, plan.scale)
        mu = float(torch.linalg.matrix_norm(r)) / plan.rank**0.5
        modules[spec.name] = ModuleAdapter(q, r, mu, mu / 3)
    return Adapter(modules)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype)).eval()
    bare = copy.deepcopy(model)
    plan = plan_for(model, args.rank)
    library = Library.empty(plan)
    for silo in range(args.silos):
        library = library.add(f"silo-{silo}", 1, random_adapter(plan))
    adapt_model(model, plan, {s.name: draw_a(plan.seed, s.name, plan.rank, s.in_features) for s in plan.modules})
    rows = PermissionRows(library)
    row = rows.row_for(library.silos)
    evidence = EvidenceState(len(plan.modules), args.tokens, library.columns, library.width)
    ids = torch.randint(0, config.vocab_size, (1, args.tokens) if args.prefill else (args.tokens, 1))

    def routed(mode: str, position: int) -> None:
        if args.prefill:
            segments = [Segment(row, 0, args.tokens, 0, mode)]
        else:
            segments = [Segment(row, position, 1, slot, mode) for slot in range(args.tokens)]
        with running(StepContext(rows, segments, evidence)), torch.inference_mode():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def unrouted(_position: int) -> None:
        with torch.inference_mode():
            bare(input_ids=ids, use_cache=False, logits_to_keep=1)

    passes: dict[str, Callable[[int], None]] = {
        "bare": unrouted,
        "per token": lambda position: routed("per_token", position),
        "evidence": lambda position: routed("evidence", position),
    }
    clock = time.process_time if args.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in passes}
    for position in range(args.rounds + 2):
        for name, run in passes.items():
            start = clock()
            run(position)
            times[name].append(clock() - start)
    base = statistics.median(times["bare"][2:])
    for name, taken in times.items():
        median = statistics.median(taken[2:])
        print(f"{name:10} {median * 1e3:8.1f} ms   {median / base:5.2f} x bare")


if __name__ == "__main__":
    main()
