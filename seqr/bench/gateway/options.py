"""What a run of ``seqr bench gateway`` is told, and what makes no sense."""

from dataclasses import dataclass, replace
from pathlib import Path

from seqr.bench.errors import BenchOptionInvalid

_QUICK = {"streams": 4, "answers": 5, "load_streams": 6}


@dataclass(frozen=True)
class Options:
    """See the options of the command ``gateway``; ``adapters`` in rising order."""

    model: Path
    adapters: tuple[int, ...]
    streams: int
    prompt: int
    tokens: int
    rounds: int
    rank: int
    dtype: str
    peft_most: int
    vllm_python: Path | None
    answers: int
    load_streams: int
    load_seconds: float

    def quick(self) -> "Options":
        """The same in miniature."""
        small = replace(self, adapters=(2, 3), prompt=12, tokens=6, rounds=2, peft_most=2, load_seconds=3.0)
        fewer = {name: min(getattr(self, name), most) for name, most in _QUICK.items()}
        return replace(small, **fewer)

    @property
    def kv_tokens(self) -> int:
        """Cache for all streams at once and as much again: what an engine of this crowd would be given."""
        return 2 * self.streams * (self.prompt + self.tokens)


def check(options: Options, threads: int) -> None:
    """Raises ``BenchOptionInvalid``."""
    for name in ("streams", "prompt", "tokens", "rounds", "rank", "load_streams"):
        if getattr(options, name) < 1:
            raise BenchOptionInvalid(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.load_seconds <= 0:
        raise BenchOptionInvalid(f"--load-seconds must be more than 0, got {options.load_seconds:g}")
    if options.answers < 0:
        raise BenchOptionInvalid(f"--answers must not be negative, got {options.answers}")
    if threads < 0:
        raise BenchOptionInvalid(f"--threads must not be negative, got {threads}")
    if options.dtype not in ("bfloat16", "float32"):
        raise BenchOptionInvalid(f"--dtype must be bfloat16 or float32, got {options.dtype}")


def sizes(text: str) -> tuple[int, ...]:
    """The library sizes in a comma-separated list, in rising order. Raises ``BenchOptionInvalid``."""
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise BenchOptionInvalid(f"--adapters must be numbers with commas between them, got {text!r:.80}") from None
    if len(found) < 2 or found[0] < 2:
        raise BenchOptionInvalid(f"--adapters must be two or more sizes of at least 2, got {text!r:.80}")
    return found
