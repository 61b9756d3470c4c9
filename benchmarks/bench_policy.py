"""How long the gateway waits for the policy: version, permitted, authenticate, and one write, on a database of
5,000 users, 200 groups and 100 silos. `python benchmarks/bench_policy.py [--grants 10000] [--database URL]`
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta

from policy import grants, silos, users
from policy.db import create_engine_for, upgrade
from policy.reader import PolicyReader
from policy.store import PolicyStore
from policy.times import utc_now
from policy.transaction import Change

USERS, GROUPS, SILOS = 5_000, 200, 100
HOW = {"actor": "bench", "reason": "benchmark"}


def fill(change: Change, count: int) -> None:
    """Groups in chains of up to 4, each user in 3 groups; a tenth of the grants deny; half go to groups."""
    dice = random.Random(1)
    for n in range(SILOS):
        silos.add_silo(change, f"silo-{n}", "", "active")
    for n in range(GROUPS):
        users.create_group(change, f"group-{n}", "")
        if n % 4:
            users.add_member(change, f"group-{n - 1}", f"group:group-{n}")
    for n in range(USERS):
        users.create_user(change, f"user-{n}", ["analyst"], "")
        for group in dice.sample(range(GROUPS), 3):
            users.add_member(change, f"group-{group}", f"user:user-{n}")
    for n in range(count):
        subject = f"user:user-{dice.randrange(USERS)}" if n % 2 else f"group:group-{dice.randrange(GROUPS)}"
        effect = "deny" if dice.random() < 0.1 else "allow"
        end = utc_now() + timedelta(days=dice.randrange(1, 400))
        grants.add_grant(change, subject, f"silo-{dice.randrange(SILOS)}", effect, None, end)


def measure(name: str, call: Callable[[int], object], times: int) -> None:
    """Wall time, and this thread's CPU time, which a busy machine blurs less."""
    wall, busy = [], []
    for n in range(times):
        started, worked = time.perf_counter(), time.thread_time()
        call(n)
        busy.append((time.thread_time() - worked) * 1e3)
        wall.append((time.perf_counter() - started) * 1e3)
    figures = "   ".join(
        f"{kind} p50 {statistics.median(spans):8.4f} p99 {sorted(spans)[int(len(spans) * 0.99)]:8.4f}"
        for kind, spans in (("wall", wall), ("cpu", busy))
    )
    print(f"{name:24s} ms: {figures}   n {times}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", help="an empty database; by default a new SQLite file")
    parser.add_argument("--grants", type=int, default=10_000)
    arguments, folder = parser.parse_args(), tempfile.TemporaryDirectory()
    url = arguments.database or f"sqlite:///{folder.name}/policy.db"
    upgrade(url)
    engine, pepper = create_engine_for(url), bytes(32)
    store = PolicyStore(engine, pepper)
    started = time.perf_counter()
    store.write(lambda change: fill(change, arguments.grants), **HOW)
    print(f"{engine.dialect.name}: {arguments.grants} grants, filled in {time.perf_counter() - started:.1f} s")
    _, secret = store.create_key("user-1", ["chat"], **HOW)
    dice, now = random.Random(2), utc_now()
    with PolicyReader(engine, pepper) as reader:
        sizes = [len(reader.permitted(f"user-{n}", now).silos) for n in range(0, USERS, 50)]
        print(f"permitted silos a user: median {statistics.median(sizes)}, most {max(sizes)}")
        measure("version", lambda _: reader.version(), 20_000)
        measure("permitted", lambda _: reader.permitted(f"user-{dice.randrange(USERS)}", now), 5_000)
        measure("permitted, unknown user", lambda _: reader.permitted("nobody", now), 2_000)
        measure("authenticate", lambda _: reader.authenticate(secret, now), 5_000)
        measure("write with audit row", lambda n: store.create_user(f"new-{n}", **HOW), 300)
        preview = {"dry_run": True, **HOW}
        measure("dry run over all users", lambda _: store.set_silo_status("silo-1", "suspended", **preview), 5)
    engine.dispose()
    folder.cleanup()


if __name__ == "__main__":
    main()
