"""Everything about routing on a GPU in one run: checks against fp64, decode, prefill, the routing grid and memory.

    python benchmarks/gpu_bench.py              # on a card; under ten minutes
    TRITON_INTERPRET=1 python benchmarks/gpu_bench.py --interpret    # tiny, on a CPU: the control flow only

Results go to stdout, the short table last, and to $OUT (or --out) as JSON. Exit status 1 if a check or a bar failed.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.gpu import checks, kernels, layers, memory, routing_grid, serving


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--interpret", action="store_true", help="tiny sizes in Triton's interpreter; no time is judged"
    )
    parser.add_argument("--tokens", type=int, default=64, help="sequences that decode together")
    parser.add_argument(
        "--context", type=int, default=1024, help="tokens in each one's KV cache; the bars are for this"
    )
    parser.add_argument("--short-context", type=int, default=128, help="a second one, not judged; 0 for none")
    parser.add_argument("--prefill", type=int, default=8192)
    parser.add_argument("--libraries", type=int, nargs="+", default=[16, 64, 1024])
    parser.add_argument("--seconds", type=float, default=540.0, help="the grid stops in time for this")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--only", nargs="+", choices=["checks", "kernels", "decode", "prefill", "memory", "grid"])
    return parser.parse_args()


class Report:
    """What was found, in sections; one that breaks is told and the others go on."""

    def __init__(self, only: list[str] | None):
        self.only = only
        self.data: dict[str, Any] = {}
        self.failed: list[str] = []
        self.lines: list[str] = []

    def section(self, name: str, work: Callable[[], Any]) -> None:
        if self.only and name not in self.only:
            return
        start = time.monotonic()
        try:
            self.data[name] = work()
        except Exception as error:  # noqa: BLE001 - time on a card is short: keep what the others find
            self.fail(f"{name}: {type(error).__name__}: {error}")
            import traceback

            traceback.print_exc()
        print(f"-- {name}: {time.monotonic() - start:.0f} s", flush=True)

    def tell(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def fail(self, what: str) -> None:
        self.failed.append(what)
        self.tell(f"FAIL {what}")


def main() -> int:
    args = arguments()
    started = time.monotonic()
    device = torch.device("cpu" if args.interpret else "cuda")
    if not args.interpret and not torch.cuda.is_available():
        print("no GPU here: run with --interpret and TRITON_INTERPRET=1, or on a machine that has one")
        return 2
    torch.manual_seed(0)
    shapes = layers.TINY if args.interpret else layers.LLAMA_8B
    if args.interpret:
        args.tokens, args.context, args.short_context, args.prefill, args.libraries = 2, 8, 0, 9, [16]
    report = Report(args.only)
    report.data["machine"] = machine(device)
    report.data["sizes"] = {"shapes": asdict(shapes), **{k: v for k, v in vars(args).items() if k != "out"}}
    print(report.data["machine"])

    report.section("checks", lambda: check(report, device, args.interpret))
    with torch.inference_mode():
        stack: list[layers.Layer] = []
        if not args.only or {"kernels", "decode", "prefill"} & set(args.only):
            if not args.interpret:
                report.data["small ops"] = layers.compile_small_ops(shapes, device)
            stack = [layers.Layer(shapes, index, device) for index in range(shapes.layers)]
        rounds, repeat = (1, 1) if args.interpret else (30, 4)

        def decode(context: int, judged: bool) -> list[dict[str, Any]]:
            return told(report, serving.measure(
                f"decode {args.tokens} @{context}", shapes, stack, args.tokens, context, tuple(args.libraries), device,
                rounds, repeat, judged and not args.interpret,
            ))  # fmt: skip

        def prefill() -> list[dict[str, Any]]:
            return told(report, serving.measure(
                f"prefill {args.prefill}", shapes, stack, args.prefill, 0, tuple(args.libraries), device,
                1 if args.interpret else 7, 1, not args.interpret,
            ))  # fmt: skip

        contexts = [context for context in (args.context, args.short_context) if context]
        report.section("kernels", lambda: profile(shapes, stack, args, device))
        report.section("decode", lambda: [row for c in contexts for row in decode(c, c == args.context)])
        report.section("prefill", prefill)
        stack.clear()
        report.section("memory", lambda: remember(report, shapes, device, args.interpret))
        until = started + args.seconds
        report.section("grid", lambda: routing(report, device, args.interpret, until))

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu_bench.json").write_text(json.dumps(report.data, indent=1, default=str))
    print(f"\n==== {report.data['machine']}; {time.monotonic() - started:.0f} s")
    print("\n".join(report.lines))
    print("ALL PASS" if not report.failed else f"{len(report.failed)} FAILED: " + "; ".join(report.failed))
    return 1 if report.failed else 0


def machine(device: torch.device) -> str:
    import triton

    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, Triton's interpreter"
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}"


def check(report: Report, device: torch.device, interpret: bool) -> list[dict[str, Any]]:
    found = []
    for one in checks.all_checks(device, interpret):
        found.append(asdict(one))
        print(f"{'PASS' if one.passed else 'FAIL'} {one.name}: {one.detail}", flush=True)
        if not one.passed:
            report.fail(f"check {one.name}: {one.detail}")
    report.tell(f"checks: {sum(one['passed'] for one in found)} of {len(found)} passed")
    return found


def profile(
    shapes: layers.Shapes, stack: list[layers.Layer], args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for adapters in {args.libraries[0], args.libraries[-1]}:
        for what, tokens, context in (("decode", args.tokens, args.context), ("prefill", args.prefill, 0)):
            name, in_a_row = f"{what} {tokens} N={adapters}", 1 if args.interpret else 20
            taken = kernels.alone(shapes, tokens, not context, adapters, device, in_a_row, 1 if args.interpret else 5)
            print(f"alone, us: {name}: " + ", ".join(f"{call} {us:.1f}" for call, us in taken.items()), flush=True)
            lines = kernels.timelines(shapes, stack, tokens, context, adapters, device)
            for way, launches in lines.items():
                print(f"in the graph, us: {name} {way}: {kernels.summary(launches)}")
                if context:
                    print(f"  second layer: {kernels.middle_layer(launches, shapes.layers)}", flush=True)
            found[name] = {"alone us": taken, "launches": {way: [asdict(x) for x in got] for way, got in lines.items()}}
    return found


def told(report: Report, results: list[serving.Result]) -> list[dict[str, Any]]:
    for result in results:
        if result.bar is not None and result.ratio < result.bar:
            report.fail(f"bar {result.what} N={result.adapters} {result.mode}: {result.ratio:.3f} < {result.bar:.2f}")
        (report.tell if result.bar is not None else print)(result.row())
    return [asdict(result) for result in results]


def remember(report: Report, shapes: layers.Shapes, device: torch.device, interpret: bool) -> dict[str, Any]:
    whole = {f"{gib} GiB": memory.counted(layers.LLAMA_8B, gib) for gib in (24.0, 139.0)}
    for card, (everything, choosing) in whole.items():
        report.tell(f"counted, 8B r=16, {card}: {everything} adapters on the card, {choosing} with b_t elsewhere")
    kept = memory.pinned(shapes, 64 if interpret else 8192, 3 if interpret else 64, device)
    report.tell(f"b_t in pinned host memory: {kept}")
    filled = memory.measured(shapes, 3 if interpret else 64, device)
    report.tell(f"largest library built: {filled}")
    if "FAIL" in kept + filled:
        report.fail("memory")
    return {"counted": whole, "pinned": kept, "measured": filled}


def routing(report: Report, device: torch.device, interpret: bool, until: float) -> list[dict[str, Any]]:
    cells = []
    for (n, r, inputs, t), times in routing_grid.grid(device, interpret, until):
        counted = {m: routing_grid.flops(m, n, r, inputs, t) for m in times}
        held = {m: routing_grid.weight_bytes(m, n, r, inputs) for m in times}
        cells.append({"N": n, "r": r, "n": inputs, "T": t, "ms": times, "flops": counted, "bytes": held})
        line = " ".join(f"{m} {v:.4f} ({v / times['ours']:.1f}x)" for m, v in times.items())
        (report.tell if (r, inputs, t) == (16, 4096, 32) else print)(f"route N={n} r={r} n={inputs} T={t}: {line}")
    return cells


if __name__ == "__main__":
    raise SystemExit(main())
