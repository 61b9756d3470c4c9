"""``seqr silo check``: what would stop a training, found before it starts. Changes and sends nothing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from seqr.errors import SeqrError
from seqr.keys import VerifyKey
from seqr.plan import Plan
from silo_client.config import SiloConfig
from silo_client.errors import NO_SUBJECT_COLUMN, NoRecords, PlanMissing
from silo_client.state import State


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``code`` is empty where all is well. ``fatal`` findings would stop a training.

    A ``note`` stops nothing and is worth knowing.
    """

    what: str
    code: str = ""
    fatal: bool = False
    note: bool = False


def examine(config: SiloConfig, plan: Plan | None, *, online: bool) -> Iterator[Finding]:
    """Yield the findings one after the other, the slow ones last."""
    state: State | None = None
    coordinator: VerifyKey | None = None
    try:
        state = State.open(config)
        fingerprint = state.signing_key().public.fingerprint
        yield Finding(f"keys and salt are in place (fingerprint {fingerprint})")
        coordinator = VerifyKey.from_b64(config.coordinator.public_key)
        yield Finding(f"orders are accepted from coordinator {coordinator.fingerprint} only")
    except SeqrError as error:
        yield _bad(error)
    if plan is None and state is not None and coordinator is not None:
        try:
            plan = state.latest_plan(coordinator)
        except PlanMissing:
            yield Finding(
                "no plan has been received yet, so lengths and the base model's digest are not checked", note=True
            )
        except SeqrError as error:
            yield _bad(error)
    usable_model = True
    for finding in _base_model(config, plan):
        usable_model = usable_model and not finding.fatal
        yield finding
    if state is not None:
        yield from _data(config, state, plan if usable_model else None)
    if online:
        yield _online(config)


def _base_model(config: SiloConfig, plan: Plan | None) -> Iterator[Finding]:
    from silo_client.base import require_base_model

    try:
        digest = require_base_model(config, plan)
    except SeqrError as error:
        yield _bad(error)
    else:
        belongs = "" if plan is None else f", which is that of plan {plan.plan_id}"
        yield Finding(f"the base model has the digest {digest[:23]}…{belongs}")


def _data(config: SiloConfig, state: State, plan: Plan | None) -> Iterator[Finding]:
    from silo_client.erased import Tombstones
    from silo_client.records import collect

    tombstones = Tombstones(state)
    if plan is None:
        found = collect(config, is_erased=tombstones.is_erased, may_be_empty=tombstones.emptied)
        number, problems, repeated, tokens = len(found.records), found.problems, found.repeated, ""
    else:
        from silo_client.adapters import current_corpus

        try:
            corpus = current_corpus(config, state, plan)
        except SeqrError as error:
            yield _bad(error)
            return
        number, problems, repeated = len(corpus.examples), corpus.problems, corpus.repeated
        tokens = f" of {corpus.tokens} tokens"
    for problem in problems:
        yield _bad(problem, fatal=not config.skip_bad)
    if repeated:
        yield Finding(f"{repeated} rows only repeat another and count once")
    if all(source.subject_column is None for source in config.data):
        yield Finding(NO_SUBJECT_COLUMN, note=True)
    if number:
        yield Finding(f"{number} record{'' if number == 1 else 's'}{tokens} can be trained on")
    else:
        yield _bad(NoRecords("no record can be trained on"))


def _online(config: SiloConfig) -> Finding:
    from silo_client.enrol import reach

    return _try(lambda: reach(config), f"the coordinator at {config.coordinator.url} answers")


def _try(step: Callable[[], None], well: str) -> Finding:
    try:
        step()
    except SeqrError as error:
        return _bad(error)
    return Finding(well)


def _bad(error: SeqrError, *, fatal: bool = True) -> Finding:
    return Finding(str(error), error.code, fatal)
