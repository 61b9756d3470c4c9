"""Once a revocation has returned, no further token of a stream that may have used the silo is handed to anybody."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from inference_gateway.engine.base import Event, Failed, GenerationRequest, Tokens
from inference_gateway.engine.transformers_engine import TransformersEngine
from inference_gateway.permissions import Permissions
from policy.db import create_engine_for, upgrade
from policy.store import PolicyStore
from seqr.plan import Plan
from tests.inference_gateway.support import OpenGuard, Resident, prompts, resident, serve

HOW: dict[str, Any] = {"actor": "test", "reason": "a test"}
PEPPER = b"\1" * 32
MODES = ("prompt_evidence", "evidence", "per_token")


@pytest.fixture
def alpha(plan: Plan) -> Resident:
    return resident(plan, "alpha", 1)


def stream(engine: TransformersEngine, alpha: Resident, mode: str = "per_token") -> AsyncGenerator[Event]:
    request = GenerationRequest("mine", tuple(prompts(1)[0]), 100, frozenset([alpha.key]), mode)
    return engine.generate(request)


async def with_a_backlog(engine: TransformersEngine, events: AsyncGenerator[Event]) -> None:
    """Read one token and let the engine run ahead of the reader by some more."""
    assert isinstance(await anext(events), Tokens)
    made = engine.info().generated_tokens
    while engine.info().generated_tokens < made + 5 and engine.info().running:
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("mode", MODES)
def test_a_slow_reader_gets_none_of_what_was_made_before_the_adapter_was_revoked(
    model_dir: Path, plan: Plan, alpha: Resident, mode: str
) -> None:
    async def use(engine: TransformersEngine) -> Any:
        events = stream(engine, alpha, mode)
        await with_a_backlog(engine, events)
        await engine.revoke(alpha.key)
        return [event async for event in events]

    (end,) = serve(model_dir, plan, use, [alpha])
    assert isinstance(end, Failed) and end.code == "adapter_replaced"


def test_a_slow_reader_of_a_whole_answer_gets_none_of_it_after_the_revocation(
    model_dir: Path, plan: Plan, alpha: Resident
) -> None:
    async def use(engine: TransformersEngine) -> Any:
        events = stream(engine, alpha)
        assert isinstance(await anext(events), Tokens)
        while engine.info().running:
            await asyncio.sleep(0.005)
        await engine.revoke(alpha.key)
        return [event async for event in events]

    (end,) = serve(model_dir, plan, use, [alpha])
    assert isinstance(end, Failed) and end.code == "adapter_replaced"


def test_a_slow_reader_gets_none_of_what_was_made_before_the_permission_was_withdrawn(
    model_dir: Path, plan: Plan, alpha: Resident
) -> None:
    guard = OpenGuard()

    async def use(engine: TransformersEngine) -> Any:
        events = stream(engine, alpha)
        await with_a_backlog(engine, events)
        guard.lost["mine"] = Failed("permission_revoked", "gone")
        while engine.info().running:
            await asyncio.sleep(0.005)
        return [event async for event in events]

    assert serve(model_dir, plan, use, [alpha], guard=guard) == [Failed("permission_revoked", "gone")]


@pytest.mark.parametrize("act", ["revoke the grant", "quarantine the silo", "revoke the key"])
def test_after_a_change_of_policy_at_most_the_token_that_was_being_handed_over_arrives(
    model_dir: Path, plan: Plan, alpha: Resident, tmp_path: Path, act: str
) -> None:
    """With the policy in a database, as the gateway has it; the engine reads it before each step and handing over."""
    url = f"sqlite:///{tmp_path / 'policy.db'}"
    upgrade(url)
    database = create_engine_for(url)
    store, permissions = PolicyStore(database, PEPPER), Permissions(database, PEPPER)
    store.create_user("alice", **HOW)
    key_id, secret = store.create_key("alice", ["chat"], **HOW)
    caller = permissions.authenticate(secret)
    store.add_silo("alpha", **HOW)
    grant = store.add_grant("user:alice", "alpha", **HOW).grant_id

    async def use(engine: TransformersEngine) -> Any:
        with permissions.watching("mine", caller, permissions.decide("alice"), frozenset(["alpha"])):
            events = stream(engine, alpha)
            await anext(events)
            if act == "revoke the grant":
                store.revoke_grant(grant, **HOW)
            elif act == "quarantine the silo":
                store.set_silo_status("alpha", "quarantined", **HOW)
            else:
                store.revoke_key(key_id, **HOW)
            made = engine.info().generated_tokens
            rest = [event async for event in events]
            return rest, engine.info().generated_tokens - made

    rest, late = serve(model_dir, plan, use, [alpha], guard=permissions)
    code = "access_ended" if act == "revoke the key" else "permission_revoked"
    assert isinstance(rest[-1], Failed) and rest[-1].code == code
    assert late <= 1
