"""`seqr bench gateway` measures what it says: every case, honest ratios, counted errors, a sentence per refusal."""

import asyncio
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from typer.testing import CliRunner

from seqr.bench.cli import app
from seqr.bench.errors import BenchFailed, BenchOptionInvalid, BenchPeerMissing
from seqr.bench.gateway import command
from seqr.bench.gateway.child import Child
from seqr.bench.gateway.crowd import Tally, as_figures, crowd, flatness
from seqr.bench.gateway.engines import Load, MeasuredEngine, start_engine
from seqr.bench.gateway.options import Options, check, sizes
from seqr.bench.gateway.report import to_markdown
from seqr.bench.gateway.sample import Case, Sample, figures, interleave, quantile
from seqr.bench.gateway.serving import Served, served_gateway
from seqr.bench.gateway.shelf import NORM, bench_plan, random_adapter, random_b, random_columns
from seqr.bench.gateway.speed import BASE, MODES, STATIC, bars, base_name, routed_name
from seqr.bench.gateway.telling import compare
from seqr.bench.gateway.vllm_peer import Vllm
from seqr.library import Library
from seqr.models import load_base_model
from seqr.public_calibration import calibrate


def options(at: Path, **changes: Any) -> Options:
    given: dict[str, Any] = {
        "model": at, "adapters": (2, 3), "streams": 2, "prompt": 5, "tokens": 3, "rounds": 1, "rank": 4,
        "dtype": "float32", "peft_most": 2, "vllm_python": None, "answers": 3, "load_streams": 2, "load_seconds": 1.0,
    }  # fmt: skip
    return Options(**(given | changes))


def run(model: Path, out: Path, *flags: str) -> dict[str, Any]:
    sizing = ["--model", str(model), "--rank", "4", "--threads", "1"]
    result = CliRunner().invoke(app, ["gateway", "--quick", *flags, *sizing, "--out", str(out)])
    assert result.exit_code == 0, result.output
    return dict(json.loads((out / "gateway.json").read_text()))


def test_one_run_measures_the_engine_at_every_size_beside_its_peers(tiny: Path, tmp_path: Path) -> None:
    report = run(tiny, tmp_path / "out")
    rows = {row["case"]: row for row in report["speed"]}
    wanted = {BASE, STATIC, "peft Arrow, N = 2", f"{routed_name(MODES[0], 3)}, with attribution"}
    wanted |= {routed_name(mode, count) for mode in MODES for count in (2, 3)} | {base_name(count) for count in (2, 3)}
    assert set(rows) == wanted
    for row in rows.values():
        assert 0 < row["lowest"] <= row["tokens per second"] <= row["highest"] and row["rounds"] == 2
        assert 0 < row["first token p50"] <= row["first token p99"]
    assert rows[routed_name("evidence", 3)]["against"] == base_name(3) and rows[BASE]["against"] == STATIC
    assert report["memory"]["tensor bytes per adapter"] > 0
    (told,) = report["telling"]
    assert told["samples"] == 5 and 0 <= told["D"] <= 1
    assert any("--peft-most" in note for note in report["notes"])
    assert any("--vllm-python" in note for note in report["notes"])
    page = (tmp_path / "out/gateway.md").read_text()
    assert all(f"| {name} |" in page for name in wanted) and "B drawn at random" in page
    assert report["workload"]["dtype"] == "float32"
    assert str(tmp_path) not in page  # no path of the machine that it was made on


class Watched:
    """An engine, and how many threads torch has in each thread of its process."""

    def __init__(self, engine: MeasuredEngine):
        self._engine = engine

    async def threads(self) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {"worker": set(), "main": {torch.get_num_threads()}}
        hook = register_module_forward_pre_hook(lambda _module, _inputs: found["worker"].add(torch.get_num_threads()))
        await self._engine.run(2, "prompt_evidence")
        hook.remove()
        found["main"].add(torch.get_num_threads())
        found["others"] = {await asyncio.to_thread(torch.get_num_threads)}
        fresh = threading.Thread(target=lambda: found["others"].add(torch.get_num_threads()))
        fresh.start()
        fresh.join()
        return found


async def watched(*args: Any) -> Watched:
    return Watched(await start_engine(*args))


def test_in_an_engines_process_only_its_worker_has_more_than_one_thread_of_torch(tiny: Path) -> None:
    async def go() -> Any:
        plan = bench_plan(tiny, load_base_model(tiny, torch.float32)[0], 4, "float32")
        with closing(Child("the engine", watched, tiny, plan, LOAD, 2, 3)) as child:
            await child.ready()
            return await child.ask("threads")

    assert asyncio.run(go()) == {"worker": {3}, "main": {1}, "others": {1}}


def test_no_answers_are_timed_when_none_are_wanted(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqr.bench.gateway.crowd.run_crowd", lambda given, _say: as_figures(Tally(), given))
    report = run(tiny, tmp_path / "out", "--load", "--answers", "0")
    assert "telling" not in report and "what the clock tells (--answers 0)" in report["notes"]
    page = (tmp_path / "out/gateway.md").read_text()
    assert "Not measured: what the clock tells (--answers 0)" in page and "Kolmogorov" not in page


def test_quick_is_never_more_than_was_asked_for(tiny: Path) -> None:
    quick = options(tiny, streams=16, answers=30, load_streams=200).quick()
    assert (quick.streams, quick.answers, quick.load_streams) == (4, 5, 6)
    few = options(tiny, streams=2, answers=0, load_streams=1).quick()
    assert (few.streams, few.answers, few.load_streams) == (2, 0, 1)


def test_the_load_run_asks_a_gateway_that_is_a_process_of_its_own(tiny: Path, tmp_path: Path) -> None:
    report = run(tiny, tmp_path / "out", "--load")
    assert "speed" not in report
    found = report["crowd"]
    assert found["streams"] == 6 and found["ends"]["200"] > 0
    assert set(found["ends"]) <= {"200", "429", "503"} and found["errors"] == 0
    assert len(found["resident bytes by quarter"]) == 4 and min(found["resident bytes by quarter"]) > 2**20
    (told,) = report["telling"]
    assert told["samples"] == 50 and "HTTP refusal" in told["what"]
    page = (tmp_path / "out/gateway.md").read_text()
    assert "Errors beyond 429 and 503: 0." in page and "| 200 |" in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"streams": 0}, "--streams must be at least 1, got 0"),
        ({"load_streams": 0}, "--load-streams must be at least 1, got 0"),
        ({"load_seconds": 0.0}, "--load-seconds must be more than 0, got 0"),
        ({"answers": -1}, "--answers must not be negative, got -1"),
        ({"dtype": "int8"}, "--dtype must be bfloat16 or float32, got int8"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_in_one_sentence(
    tiny: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(BenchOptionInvalid) as refused:
        check(options(tiny, **changes), 0)
    assert str(refused.value) == said


def test_negative_threads_and_sizes_that_are_none_are_refused(tiny: Path) -> None:
    with pytest.raises(BenchOptionInvalid, match="--threads must not be negative, got -1"):
        check(options(tiny), -1)
    for text in ("three", "3,,4", ""):
        with pytest.raises(BenchOptionInvalid, match="--adapters must be numbers with commas between them"):
            sizes(text)
    for text in ("3", "1,2", "0,5"):
        with pytest.raises(BenchOptionInvalid, match="two or more sizes of at least 2"):
            sizes(text)
    assert sizes("64,3,64") == (3, 64)


def sample(seconds: float, tokens: int = 10) -> Sample:
    return Sample(seconds, seconds / 2, tokens, (seconds / 10,))


def test_cases_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def case(name: str) -> Case:
        async def go() -> Sample:
            order.append(name)
            return sample(float(len(order)))

        return Case(name, 0, go)

    kept = asyncio.run(interleave([case("a"), case("b")], 2, lambda _line: None))
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [one.seconds for one in kept["a"]] == [4.0, 5.0]


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    async def never() -> Sample:
        raise AssertionError

    samples = {"base": [sample(1.0), sample(2.0), sample(4.0)], "routed": [sample(2.0), sample(2.5), sample(4.0)]}
    row = figures(Case("routed", 16, never, "base"), samples)
    assert (row["ratio"], row["lowest ratio"], row["highest ratio"]) == (0.8, 0.5, 1.0)
    assert (row["tokens per second"], row["tokens per cpu second"]) == (4.0, 8.0)
    assert (row["first token p50"], row["first token p99"]) == (0.25, 0.4)


def test_the_pace_is_that_between_a_streams_tokens() -> None:
    async def never() -> Sample:
        raise AssertionError

    quick = Sample(10.0, 1.0, 12, (1.0, 2.0), (6.0, 7.0))  # six tokens a stream, five gaps of a second
    slow = Sample(20.0, 1.0, 12, (1.0, 2.0), (11.0, 12.0))
    row = figures(Case("slow", 0, never, "quick"), {"slow": [slow], "quick": [quick]})
    assert row["between tokens p50"] == 2.0 and row["pace ratio"] == 0.5


def test_quantiles_are_values_that_occurred() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [quantile(values, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert quantile([7.0], 0.5) == 7.0


def test_bars_are_held_against_their_own_rows() -> None:
    rows = [{"case": routed_name(mode, n), "ratio": 0.75} for mode in MODES for n in (16, 1024)]
    found = bars([*rows, {"case": BASE, "ratio": 0.95}], (16, 1024))
    assert [(one["bar"], one["met"]) for one in found] == [(0.8, False)] * 3 + [(0.7, True)] * 3 + [(0.9, True)]


def test_the_benchs_columns_are_those_that_a_library_makes_of_the_same_adapter(tiny: Path) -> None:
    model, _ = load_base_model(tiny, torch.float32)
    plan = bench_plan(tiny, model, 4, "float32")
    z = {spec.name: torch.randn(50, 4) for spec in plan.modules}
    adapter = random_adapter(plan, 1)
    expected = Library.empty(plan).add("silo00001", 1, adapter, calibrate(adapter, z))
    made = Library(plan, random_columns(plan, 2, z)[1:])
    assert made.columns == expected.columns
    for one, other in zip(made.stacks, expected.stacks, strict=True):
        torch.testing.assert_close(one.gram, other.gram, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.offset, other.offset, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.b_t[0], other.b_t[0], rtol=1e-4, atol=1e-6)
    spec = plan.modules[0]
    b = random_b(spec, 4, torch.Generator().manual_seed(0))
    assert float(b.norm()) == pytest.approx(NORM * spec.out_features**0.5)


def test_memory_that_grows_is_not_flat() -> None:
    assert flatness([50] * 10 + [100] * 20 + [104] * 10) == {
        "resident bytes by quarter": [50, 100, 100, 104],
        "flat": True,
    }
    assert flatness([100] * 10 + [110] * 10 + [120] * 10 + [130] * 10)["flat"] is False
    assert flatness([100, 100])["flat"] is False  # too short to know


def test_the_ks_test_tells_two_distributions_apart_and_not_one_from_itself() -> None:
    times = [0.1 + 0.001 * (number * 37 % 100) for number in range(200)]
    assert compare("same", times[::2], times[1::2])["indistinguishable"]
    found = compare("slower", times, [seconds + 0.05 for seconds in times])
    assert not found["indistinguishable"] and found["D"] > 0.4 and found["p"] < 1e-6


Answer = tuple[int, bytes]
DONE = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: [DONE]\n\n'
FAILED = b'data: {"choices":[]}\n\ndata: {"error":{"code":"generation_failed"}}\n\ndata: [DONE]\n\n'


@contextmanager
def answering(*answers: Answer) -> Iterator[Served]:
    """A server that gives these answers in turn."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            status, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing is logged."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{server.server_address[1]}", "tiny", os.getpid(), {"user0": "key"})
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_every_end_of_a_request_is_counted_and_only_429_and_503_are_no_errors(tiny: Path) -> None:
    with answering(
        (500, b"{}"), (429, b"{}"), (503, b"{}"), (200, FAILED), (200, b"data: {}\n\n"), (200, DONE)
    ) as served:
        tally = asyncio.run(crowd(served, 1, 2.0, 3))
    assert {end: count for end, count in tally.ends.items() if end != "200"} == {
        "500": 1, "429": 1, "503": 1, "stream: generation_failed": 1, "stream: broken off": 1,
    }  # fmt: skip
    assert tally.ends["200"] == tally.pieces > 0 and tally.errors == 3
    row = as_figures(tally, options(tiny))
    assert row["errors"] == 3 and row["answer p50"] > 0 and row["resident bytes by quarter"]


def test_a_server_that_is_not_there_is_an_error_of_the_connection() -> None:
    with answering((200, DONE)) as served:
        pass
    tally = asyncio.run(crowd(served, 1, 0.1, 3))
    assert set(tally.ends) == {"connection: ConnectError"} and tally.errors > 0


def test_errors_under_load_end_the_command_with_status_1(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tally = Tally()
    tally.ends["500"] += 1
    told = compare("x", [1.0, 2.0], [1.0, 2.0])
    monkeypatch.setattr(command, "_load", lambda _options: (as_figures(tally, options(tiny)), told))
    arguments = ["gateway", "--quick", "--load", "--model", str(tiny), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, arguments).exit_code == 1
    assert "Errors beyond 429 and 503: 1." in (tmp_path / "out/gateway.md").read_text()


def test_a_gateway_that_does_not_come_up_is_named_with_its_own_last_words(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEQR_GATEWAY_SSL_CERTFILE", "alone.pem")
    said = r"did not become ready: error\[settings_invalid\]: ssl_certfile and ssl_keyfile belong together"
    with pytest.raises(BenchFailed, match=said), served_gateway(options(tiny), tmp_path / "gateway", 2, 1):
        pass


LOAD = Load(((5, 6, 7), (6, 7, 8)), 4, "float32", 64)
FAKE_VLLM = """
from types import SimpleNamespace as N
def SamplingParams(**options):
    assert options["ignore_eos"] and options["temperature"] == 0.0
    return options
class LLM:
    def __init__(self, **options):
        print("vLLM greets its users on stdout")
        assert options["max_model_len"] == 7 and options["max_num_seqs"] == 2
    def generate(self, prompts, options, use_tqdm):
        made = [N(token_ids=[1] * options["max_tokens"])]
        return [N(outputs=made, metrics=N(first_token_latency=0.5)) for _ in prompts]
"""


def test_vllm_runs_in_the_python_that_is_given(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    vllm = Vllm(Path(sys.executable), tiny, LOAD, 1)
    try:
        for _ in range(2):
            found = asyncio.run(vllm.run())
            assert found.tokens == 8 and found.first == (0.5, 0.5) and found.seconds > 0
    finally:
        vllm.close()


def test_a_python_without_vllm_is_told_apart_from_none(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchPeerMissing, match="vLLM was not measured: ModuleNotFoundError: No module named 'vllm'"):
        Vllm(Path(sys.executable), tiny, LOAD, 1)
    with pytest.raises(BenchPeerMissing, match=r"vLLM was not measured: .*/python cannot be run: No such file"):
        Vllm(tmp_path / "python", tiny, LOAD, 1)


def test_a_page_without_a_section_leaves_it_out() -> None:
    work = {"model": "m", "dtype": "d", "streams": 1, "prompt": 1, "tokens": 1, "rank": 1, "rounds": 1}
    report = {"machine": {"cores": "2"}, "workload": work, "notes": ["vLLM: no"], "command": "c", "seconds": 1.0}
    page = to_markdown(report)
    assert "##" not in page and "Not measured: vLLM: no" in page
