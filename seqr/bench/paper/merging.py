"""What one machine has measured of a run, taken over into the folder of the same run on another."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = "results"
# Results that belong to a seed have it as the part of their path below the kind; that of a router's answers is below
# the router. Extras are of the run's first seed, texts and the base model's answers of none.
EXTRA = "extra"
SEED_AT = {"answer": 2, "given": 1, "own": 1, "public": 1, "read": 1, "texts": 2, "train": 1}


def take_over(theirs: Path, mine: Path, seeds: Sequence[int], first: int, say: Callable[[str], None]) -> None:
    """Copy the results of ``seeds`` from the run folder ``theirs`` into ``mine``, and say what came of each seed.

    A seed that is begun here is taken only when both have it from the same adapters: else its answers would mix. What
    is here already stays. first: the run's first seed, to which the extras belong.
    """
    files = sorted(file.relative_to(theirs / RESULTS) for file in (theirs / RESULTS).rglob("*") if _is_result(file))
    for seed in seeds:
        of_seed = [name for name in files if seed_of(name, first) == seed]
        if not of_seed:
            say(f"seed {seed}: nothing there")
        elif _begun(mine, seed, first) and not _same_adapters(theirs, mine, seed):
            say(f"seed {seed}: left out, it was begun here with other adapters")
        else:
            say(f"seed {seed}: {_copy(theirs, mine, of_seed)} files taken")
    _copy(theirs, mine, [name for name in files if seed_of(name, first) is None])


def seed_of(name: Path, first: int) -> int | None:
    """The seed that a result belongs to, by its path below the results; None for one that belongs to all."""
    if name.parts[0] == EXTRA:
        return first
    part = name.parts[SEED_AT[name.parts[0]]].removesuffix(name.suffix).removesuffix("-unique")
    return int(part) if part.isdecimal() else None


def _is_result(file: Path) -> bool:
    kinds = {EXTRA, *SEED_AT}
    return file.suffix in (".json", ".safetensors") and bool(kinds & set(file.parts[:-1]))


def _begun(folder: Path, seed: int, first: int) -> bool:
    found = (folder / RESULTS).rglob("*")
    return any(_is_result(f) and seed_of(f.relative_to(folder / RESULTS), first) == seed for f in found)


def _same_adapters(theirs: Path, mine: Path, seed: int) -> bool:
    here, there = _trained(mine, seed), _trained(theirs, seed)
    shared = set(here) & set(there)
    return bool(shared) and all(here[name] == there[name] for name in shared)


def _trained(folder: Path, seed: int) -> dict[str, Any]:
    base = folder / RESULTS / "train" / str(seed)
    return {str(file.relative_to(base)): json.loads(file.read_bytes())["adapter"] for file in base.rglob("*.json")}


def _copy(theirs: Path, mine: Path, names: Sequence[Path]) -> int:
    missing = [name for name in names if not (mine / RESULTS / name).exists()]
    for name in missing:
        target = mine / RESULTS / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        shutil.copyfile(theirs / RESULTS / name, partial)
        partial.rename(target)
    return len(missing)
