"""Intake against a coordinator in memory: what is admitted, every way to be refused, and what is sworn to after."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from inference_gateway.coordinator_client import CoordinatorClient
from inference_gateway.engine.base import AdapterKey
from inference_gateway.errors import CoordinatorRefused, CoordinatorUnreachable
from inference_gateway.intake import Intake
from seqr.adapter import Adapter, ModuleAdapter
from seqr.document import utc_now, utc_text
from seqr.keys import SealingKey, SigningKey
from seqr.models import load_base_model
from seqr.plan import GatewayKey, Plan
from seqr.public_calibration import calibrate, collect_z
from seqr.public_text import calibration_texts, chat_frame, framed, public_texts
from seqr.purge import verify_purge
from seqr.shared_a import verify_a
from tests.inference_gateway.fake_coordinator import API_KEY, FakeCoordinator, Revision
from tests.inference_gateway.support import Gateway, random_adapter, run

Z = Mapping[str, torch.Tensor]


@dataclass
class StubEngine:
    """Keeps what it is given; a library version per change."""

    loaded: dict[str, tuple[AdapterKey, Any]] = field(default_factory=dict)
    version: int = 0

    def info(self) -> Any:
        return SimpleNamespace(adapters=tuple(k for k, _ in self.loaded.values()), library_version=self.version)

    async def load(self, key: AdapterKey, _adapter: Adapter, statistics: Any) -> int:
        self.loaded[key.silo_id] = (key, statistics)
        self.version += 1
        return self.version

    async def revoke(self, key: AdapterKey) -> int:
        del self.loaded[key.silo_id]
        self.version += 1
        return self.version


@pytest.fixture(scope="session")
def z(model_dir: Path, plan: Plan) -> Z:
    model, tokenizer = load_base_model(model_dir, torch.float32, "sdpa")
    return collect_z(model, calibration_texts(tokenizer)[:40], plan, verify_a(plan))


@pytest.fixture
def coordinator(plan: Plan) -> FakeCoordinator:
    return FakeCoordinator(plan)


@pytest.fixture
def engine() -> StubEngine:
    return StubEngine()


@pytest.fixture
def make_intake(coordinator: FakeCoordinator, plan: Plan, gateway: Gateway, z: Z) -> Callable[[StubEngine], Intake]:
    def make(engine: StubEngine) -> Intake:
        client = CoordinatorClient("http://c", API_KEY, transport=httpx.ASGITransport(app=coordinator.app))
        return Intake(client, engine, plan, gateway.sealing, gateway.signing, z)  # type: ignore[arg-type]

    return make


@pytest.fixture
def intake(make_intake: Callable[[StubEngine], Intake], engine: StubEngine) -> Intake:
    return make_intake(engine)


def one_pass(intake: Intake) -> None:
    run(intake.reconcile())


def test_a_sound_bundle_is_recalibrated_admitted_and_loaded(
    coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, plan: Plan, z: Z
) -> None:
    adapter = random_adapter(plan, 1)
    row = coordinator.stage("alpha", 1, adapter)
    assert not intake.status.settled
    one_pass(intake)
    assert (row.state, row.adapter_digest) == ("active", adapter.digest)
    key, statistics = engine.loaded["alpha"]
    assert key == AdapterKey("alpha", 1, adapter.digest)
    assert statistics == calibrate(adapter, z)
    assert intake.status.settled


def with_tensor(adapter: Adapter, **changes: Any) -> Adapter:
    """The adapter with parts of its first module replaced."""
    name, first = next(iter(adapter.modules.items()))
    parts = {"q": first.q.clone(), "r": first.r.clone(), "mu": first.mu, "sigma": first.sigma} | changes
    return Adapter({**adapter.modules, name: ModuleAdapter(**parts)})


def first_r(adapter: Adapter) -> torch.Tensor:
    return next(iter(adapter.modules.values())).r.clone()


def first_q(adapter: Adapter) -> torch.Tensor:
    return next(iter(adapter.modules.values())).q.clone()


def nan_in_r(a: Adapter) -> Adapter:
    r = first_r(a)
    r[0, 0] = float("nan")
    return with_tensor(a, r=r)


def lower_r(a: Adapter) -> Adapter:
    r = first_r(a)
    r[1, 0] = 1.0
    return with_tensor(a, r=r)


def negative_r(a: Adapter) -> Adapter:
    r, q = first_r(a), first_q(a)
    r[0], q[:, 0] = -r[0], -q[:, 0]
    return with_tensor(a, r=r, q=q)


def rank_one_r(a: Adapter) -> Adapter:
    r = torch.zeros_like(first_r(a))
    r[0] = first_r(a)[0]
    return with_tensor(a, r=r)


def missing_module(a: Adapter) -> Adapter:
    return Adapter(dict(list(a.modules.items())[1:]))


# code -> how the adapter is spoilt before it is signed
SPOILT: dict[str, Callable[[Adapter], Adapter]] = {
    "not_finite": nan_in_r,
    "r_not_upper_triangular": lower_r,
    "r_diagonal_negative": negative_r,
    "q_not_orthonormal": lambda a: with_tensor(a, q=first_q(a) * 10),
    "norm_out_of_bounds": lambda a: with_tensor(a, r=first_r(a) * 1e6),
    "rank_degenerate": rank_one_r,
    "statistics_invalid": lambda a: with_tensor(a, sigma=0.0),
    "tensor_shape_mismatch": lambda a: with_tensor(a, q=first_q(a)[:-1]),
    "tensor_set_mismatch": missing_module,
}
# code -> what is wrong about the manifest
LIES: dict[str, dict[str, Any]] = {
    "manifest_signature_invalid": {"signer": SigningKey.generate()},
    "wrong_silo": {"silo_id": "beta"},
    "wrong_plan": {"plan_id": "plan-0000000000000000"},
    "nonce_mismatch": {"job_nonce": "nonce-of-another-job"},
    "revision_not_next": {"revision": 7},
    "manifest_expired": {"expires_at": utc_text(utc_now() - timedelta(seconds=2))},
    "tensor_digest_mismatch": {"adapter_digest": "0" * 64},
}


def refused(coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, row: Revision, code: str) -> None:
    """The revision is quarantined by name, nothing is loaded, and it is not tried again."""
    one_pass(intake)
    assert row.state == "quarantined" and row.verdict is not None
    assert row.verdict[0] == code and len(row.verdict[1]) > 20
    assert engine.loaded == {} and engine.version == 0
    row.state = "staged"
    row.verdict = None
    one_pass(intake)
    assert row.verdict is None
    assert intake.status.refused == {row.revision_id: code} and intake.status.settled


@pytest.mark.parametrize("code", SPOILT)
def test_a_spoilt_adapter_is_quarantined_by_name_and_never_loaded(
    coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, plan: Plan, code: str
) -> None:
    row = coordinator.stage("alpha", 1, SPOILT[code](random_adapter(plan, 1)))
    refused(coordinator, intake, engine, row, code)


@pytest.mark.parametrize("code", LIES)
def test_a_lying_manifest_is_quarantined_by_name_and_never_loaded(
    coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, plan: Plan, code: str
) -> None:
    sealed, _ = coordinator.bundle("alpha", 1, random_adapter(plan, 1), signer=coordinator.silo_key("alpha"))
    changes = {"signer": coordinator.silo_key("alpha"), **LIES[code]}
    sealed, _ = coordinator.bundle(changes.pop("silo_id", "alpha"), changes.pop("revision", 1), random_adapter(plan, 1),
                                   **{"job_nonce": "nonce-alpha-1", **changes})  # fmt: skip
    row = coordinator.stage("alpha", 1, random_adapter(plan, 1), blob=sealed)
    refused(coordinator, intake, engine, row, code)


def test_a_flipped_byte_in_the_bundle_is_quarantined_by_name(
    coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, plan: Plan
) -> None:
    sealed, _ = coordinator.bundle("alpha", 1, random_adapter(plan, 1))
    flipped = bytearray(sealed)
    flipped[-100] ^= 1
    row = coordinator.stage("alpha", 1, random_adapter(plan, 1), blob=bytes(flipped))
    refused(coordinator, intake, engine, row, "bundle_unreadable")


def test_a_byte_flipped_at_the_coordinator_is_quarantined_by_name(
    coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, plan: Plan
) -> None:
    row = coordinator.stage("alpha", 1, random_adapter(plan, 1))
    flipped = bytearray(row.blob)
    flipped[-100] ^= 1
    row.blob = bytes(flipped)
    refused(coordinator, intake, engine, row, "bundle_digest_mismatch")


def test_a_bundle_for_another_gateway_is_quarantined_by_name(
    coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, plan: Plan
) -> None:
    other = GatewayKey.of(SealingKey.generate().public, SigningKey.generate().public)
    coordinator.plan = replace(plan, gateway_keys=(other,))
    row = coordinator.stage("alpha", 1, random_adapter(plan, 1))
    coordinator.plan = plan
    refused(coordinator, intake, engine, row, "bundle_not_for_this_gateway")


def test_an_oversized_bundle_is_quarantined_by_name(
    coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, plan: Plan
) -> None:
    row = coordinator.stage("alpha", 1, random_adapter(plan, 1), blob=b"x" * 8_000_000)
    refused(coordinator, intake, engine, row, "bundle_too_large")


def test_a_tombstoned_adapter_is_quarantined_by_name(
    coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, plan: Plan
) -> None:
    adapter = random_adapter(plan, 1)
    coordinator.tombstones.add(adapter.digest)
    refused(coordinator, intake, engine, coordinator.stage("alpha", 1, adapter), "tombstoned_adapter")


def test_the_bundle_of_an_admitted_revision_cannot_be_replayed_as_the_next(
    coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, plan: Plan
) -> None:
    first = coordinator.stage("alpha", 1, random_adapter(plan, 1))
    one_pass(intake)
    again = coordinator.stage("alpha", 2, random_adapter(plan, 1), blob=first.blob)
    one_pass(intake)
    assert again.verdict is not None and again.verdict[0] == "nonce_replayed"
    assert engine.loaded["alpha"][0].revision == 1


def test_an_outlier_among_three_other_silos_is_quarantined_by_name(
    coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, plan: Plan
) -> None:
    for seed, silo in enumerate(("a", "b", "c")):
        coordinator.stage(silo, 1, random_adapter(plan, seed))
    one_pass(intake)
    row = coordinator.stage("loud", 1, random_adapter(plan, 9, strength=0.35 * 14))
    one_pass(intake)
    assert row.verdict is not None and row.verdict[0] == "norm_out_of_bounds"
    assert sorted(engine.loaded) == ["a", "b", "c"]


def test_one_refused_silo_does_not_keep_the_others_waiting(
    coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, plan: Plan
) -> None:
    bad = coordinator.stage("alpha", 1, nan_in_r(random_adapter(plan, 1)))
    good = coordinator.stage("beta", 1, random_adapter(plan, 2))
    one_pass(intake)
    assert (bad.state, good.state) == ("quarantined", "active") and list(engine.loaded) == ["beta"]


def test_a_bundle_that_cannot_be_fetched_keeps_neither_removals_nor_others_waiting(
    coordinator: FakeCoordinator,
    intake: Intake,
    engine: StubEngine,
    plan: Plan,
    caplog: pytest.LogCaptureFixture,
) -> None:
    served = coordinator.stage("beta", 1, random_adapter(plan, 1))
    retired = coordinator.stage("gamma", 1, random_adapter(plan, 2))
    one_pass(intake)
    coordinator.stage("alpha", 1, random_adapter(plan, 3)).cut = True
    coordinator.stage("delta", 1, random_adapter(plan, 4)).cut = True
    last = coordinator.stage("omega", 1, random_adapter(plan, 5))
    served.state, retired.state = "quarantined", "retired"
    for _ in range(3):
        one_pass(intake)
    assert sorted(engine.loaded) == ["omega"] and last.state == "active" and retired.state == "destroyed"
    assert "rev-delta-1" in str(intake.status.last_error)
    # Once each, however often it is tried.
    assert sorted(line.split(":")[1] for line in caplog.messages if "intake waits" in line) == [
        " revision rev-alpha-1",
        " revision rev-delta-1",
    ]
    coordinator.revisions["rev-alpha-1"].cut = coordinator.revisions["rev-delta-1"].cut = False
    one_pass(intake)
    assert sorted(engine.loaded) == ["alpha", "delta", "omega"] and intake.status.last_error is None


def test_what_may_no_longer_be_served_leaves_before_anything_is_checked(
    coordinator: FakeCoordinator,
    intake: Intake,
    engine: StubEngine,
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = coordinator.stage("beta", 1, random_adapter(plan, 1))
    one_pass(intake)
    served.state = "quarantined"
    coordinator.stage("alpha", 1, random_adapter(plan, 2))
    resident: list[list[str]] = []
    check = intake.check
    monkeypatch.setattr(intake, "check", lambda *given: (resident.append(sorted(engine.loaded)), check(*given))[1])
    one_pass(intake)
    assert resident == [[]] and sorted(engine.loaded) == ["alpha"]


def test_a_bundle_that_is_destroyed_does_not_keep_a_gateway_from_being_ready(
    coordinator: FakeCoordinator, make_intake: Callable[[StubEngine], Intake], intake: Intake, plan: Plan
) -> None:
    coordinator.stage("alpha", 1, random_adapter(plan, 1))
    coordinator.stage("beta", 1, random_adapter(plan, 2))
    one_pass(intake)
    coordinator.revisions["rev-alpha-1"].gone = True
    fresh = StubEngine()
    restarted = make_intake(fresh)
    one_pass(restarted)
    assert sorted(fresh.loaded) == ["beta"] and restarted.status.settled
    assert restarted.status.refused == {"rev-alpha-1": "bundle_destroyed"}


def test_a_new_revision_replaces_the_old_one_which_is_purged_and_sworn_to(
    coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, plan: Plan, gateway: Gateway
) -> None:
    old = coordinator.stage("alpha", 1, random_adapter(plan, 1))
    one_pass(intake)
    new = coordinator.stage("alpha", 2, random_adapter(plan, 2))
    one_pass(intake)
    assert (old.state, new.state) == ("destroyed", "active")
    assert engine.loaded["alpha"][0].revision == 2 and engine.version == 2
    claim = verify_purge(old.purges[0], [gateway.signing.public])
    assert (claim.revision_id, claim.silo_id, claim.adapter_digest) == (old.revision_id, "alpha", old.adapter_digest)
    assert claim.gateway_key_id == gateway.public.key_id and claim.library_version == 2 and claim.where


def test_a_retired_revision_without_successor_leaves_and_is_sworn_to(
    coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, plan: Plan
) -> None:
    row = coordinator.stage("alpha", 1, random_adapter(plan, 1))
    one_pass(intake)
    row.state = "retired"
    one_pass(intake)
    assert engine.loaded == {} and row.state == "destroyed" and len(row.purges) == 1


def test_many_revisions_that_leave_together_stop_the_process_once_and_not_each(
    coordinator: FakeCoordinator, intake: Intake, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [coordinator.stage(f"silo{number}", 1, random_adapter(plan, number)) for number in range(5)]
    one_pass(intake)
    for row in rows:
        row.state = "retired"
    collections: list[int] = []
    monkeypatch.setattr("gc.collect", lambda: collections.append(1))
    one_pass(intake)
    assert [row.state for row in rows] == ["destroyed"] * 5 and len(collections) == 1


def test_what_the_coordinator_no_longer_lists_leaves_the_library(
    coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, plan: Plan
) -> None:
    row = coordinator.stage("alpha", 1, random_adapter(plan, 1))
    one_pass(intake)
    row.state = "quarantined"
    one_pass(intake)
    assert engine.loaded == {}


def test_after_a_restart_active_revisions_are_fetched_again_and_expiry_no_longer_counts(
    coordinator: FakeCoordinator,
    make_intake: Callable[[StubEngine], Intake],
    intake: Intake,
    engine: StubEngine,
    plan: Plan,
) -> None:
    row = coordinator.stage("alpha", 1, random_adapter(plan, 1))
    one_pass(intake)
    sealed, _ = coordinator.bundle("alpha", 1, random_adapter(plan, 1), expires_at=utc_text(utc_now()))
    row.blob, row.sealed_sha256 = sealed, hashlib.sha256(sealed).hexdigest()
    fresh = StubEngine()
    one_pass(make_intake(fresh))
    assert fresh.loaded["alpha"][0] == engine.loaded["alpha"][0]


def test_revisions_of_another_plan_are_left_alone(
    coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, plan: Plan
) -> None:
    row = coordinator.stage("alpha", 1, random_adapter(plan, 1))
    coordinator.plan = replace(plan, plan_id="plan-0000000000000000")
    one_pass(intake)
    assert row.state == "staged" and engine.loaded == {}
    assert intake.status.other_plans == {"plan-0000000000000000"} and intake.status.settled


def test_an_unreachable_coordinator_takes_nothing_away(
    coordinator: FakeCoordinator, intake: Intake, engine: StubEngine, plan: Plan
) -> None:
    coordinator.stage("alpha", 1, random_adapter(plan, 1))
    one_pass(intake)
    coordinator.down = True
    with pytest.raises(CoordinatorRefused):
        one_pass(intake)
    assert list(engine.loaded) == ["alpha"]


def test_a_coordinator_that_talks_nonsense_is_named(gateway: Gateway, plan: Plan, engine: StubEngine, z: Z) -> None:
    for body in (b"<html>", b"{}", b'[{"revision_id": "x"}]'):
        transport = httpx.MockTransport(lambda _request, body=body: httpx.Response(200, content=body))
        client = CoordinatorClient("http://c", API_KEY, transport=transport)
        with pytest.raises(CoordinatorUnreachable):
            one_pass(Intake(client, engine, plan, gateway.sealing, gateway.signing, z))  # type: ignore[arg-type]


def test_public_text_is_calibrated_in_the_frame_of_a_chat(model_dir: Path) -> None:
    _, tokenizer = load_base_model(str(model_dir), torch.float32)
    tokens = framed(tokenizer, "Bread needs time.")
    message = [{"role": "user", "content": "Bread needs time."}]
    assert tokenizer.decode(tokens) == tokenizer.apply_chat_template(
        message, add_generation_prompt=True, tokenize=False
    )


def test_the_frame_is_what_all_conversations_begin_and_end_with(model_dir: Path) -> None:
    _, tokenizer = load_base_model(str(model_dir), torch.float32)
    shared = chat_frame(tokenizer)
    assert len(shared.prefix) > 1
    assert len(shared.suffix) > 1
    for text in ("Who is late?", "Bread needs time."):
        tokens = framed(tokenizer, text)
        silent = shared.of(tokens)
        words = tokens[silent.head : silent.tail.start]
        assert silent.tail.stop == len(tokens)
        assert shared.prefix + words + shared.suffix == tokens
        assert tokenizer.decode(words).strip() == text


def test_calibration_hears_the_words_and_not_the_frame(model_dir: Path) -> None:
    _, tokenizer = load_base_model(str(model_dir), torch.float32)
    text = calibration_texts(tokenizer)[0]
    heard = [token for position, token in enumerate(text.ids) if text.frame.speaks(position)]
    assert tokenizer.decode(heard).strip() in public_texts()
