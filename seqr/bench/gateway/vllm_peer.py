"""vLLM without LoRA, in a Python of its own: its versions of torch and transformers are not this project's."""

import asyncio
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from seqr.bench.errors import BenchPeerMissing
from seqr.bench.gateway.engines import Load
from seqr.bench.gateway.sample import Sample

_WORKER = Path(__file__).with_name("vllm_worker.py")


class Vllm:
    """One vLLM process that runs the same prompts whenever it is told to. Raises ``BenchPeerMissing``."""

    def __init__(self, python: Path, model: Path, load: Load, threads: int):
        work = {
            "model": str(model),
            "dtype": load.dtype,
            "longest": len(load.prompts[0]) + load.tokens,
            "prompts": load.prompts,
            "tokens": load.tokens,
        }
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        try:
            self._process = subprocess.Popen(
                [str(python), str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                # On a CPU vLLM keeps a processor back, and takes a share of all memory for its cache (GiB).
                env={
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
                    **os.environ,
                    "OMP_NUM_THREADS": str(threads),
                },
            )
        except OSError as error:
            raise BenchPeerMissing(f"vLLM was not measured: {python} cannot be run: {error.strerror}") from None
        self._ask(json.dumps(work))

    async def run(self) -> Sample:
        """One batch; processor seconds are not known from here and are those of the wall clock."""
        told = await asyncio.to_thread(self._ask, "again")
        return Sample(told["seconds"], told["seconds"], told["tokens"], tuple(told["first"]))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def _ask(self, line: str) -> Any:
        asked, answers = self._process.stdin, self._process.stdout
        if asked is None or answers is None:
            raise BenchPeerMissing("vLLM was not measured: its process has no pipes")
        try:
            print(line, file=asked, flush=True)
            return json.loads(answers.readline())
        except (OSError, ValueError):
            self._process.kill()
            self._process.communicate()
            self._said.seek(0)
            last = (self._said.read().strip().splitlines() or ["it ended without a word"])[-1]
            raise BenchPeerMissing(f"vLLM was not measured: {last}") from None
