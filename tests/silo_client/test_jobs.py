"""Orders: only the pinned coordinator's, only once per nonce, and nothing but fixed sentences in return."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from seqr.bundle import MANIFEST_PAYLOAD_TYPE, Manifest, open_sealed
from seqr.canonical import parse_json
from seqr.document import utc_now, utc_text
from seqr.dsse import verify
from seqr.intake import Expectation, check_bundle
from seqr.job import sign_job
from seqr.keys import SigningKey
from seqr.plan import sign_plan
from silo_client import jobs
from silo_client.jobs import SENTENCES, JobReply, handle_job

from .conftest import Federation, Silo, rows


def carry_out(silo: Silo, federation: Federation, order: Any) -> JobReply:
    return handle_job(federation.signed(order), federation.plan_env, silo.config)


def opened(reply: JobReply, silo: Silo, federation: Federation) -> Manifest:
    assert reply.bundle is not None
    content = open_sealed(reply.bundle, federation.sealing)
    payload = verify(content.manifest_envelope, [silo.state.signing_key().public], MANIFEST_PAYLOAD_TYPE)
    return Manifest.from_dict(parse_json(payload, "the manifest", 1 << 20))


def test_a_train_order_is_answered_with_a_bundle_that_intake_admits(silo: Silo, federation: Federation) -> None:
    order = federation.order()
    reply = carry_out(silo, federation, order)
    assert (reply.status, reply.code, reply.attestation) == ("ok", "", b"")
    assert reply.bundle is not None
    expected = Expectation(
        silo_id="silo-a",
        silo_keys=(silo.state.signing_key().public,),
        revision=1,
        job_nonce=order.nonce,
        tombstoned_digests=frozenset(),
        now=utc_now(),
    )
    adapter = check_bundle(open_sealed(reply.bundle, federation.sealing), federation.plan, expected, None)
    assert adapter.digest == opened(reply, silo, federation).adapter_digest


def test_counts_are_in_the_manifest_only_when_the_owner_shares_them(
    make_silo: Callable[..., Silo], federation: Federation
) -> None:
    shy, open_handed = make_silo("shy"), make_silo("open", share_counts=True)
    manifests = [opened(carry_out(s, federation, federation.order()), s, federation) for s in (shy, open_handed)]
    assert (manifests[0].records, manifests[0].tokens) == (None, None)
    assert manifests[1].records == 9
    assert manifests[1].tokens is not None


def test_the_same_order_again_gets_the_same_sealed_bytes(silo: Silo, federation: Federation) -> None:
    order = federation.order()
    first = carry_out(silo, federation, order)
    silo.write(rows(6))
    assert carry_out(silo, federation, order) == first


def test_an_answered_order_is_answered_again_after_it_expired(
    silo: Silo, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = federation.order()
    first = carry_out(silo, federation, order)
    monkeypatch.setattr(jobs, "utc_now", lambda: utc_now() + timedelta(days=2))
    assert carry_out(silo, federation, order) == first


def test_another_order_under_a_used_nonce_is_refused(silo: Silo, federation: Federation) -> None:
    order = federation.order()
    carry_out(silo, federation, order)
    assert carry_out(silo, federation, replace(order, revision=2)).code == "nonce_reused"
    erase = federation.order("erase", nonce=order.nonce)
    assert carry_out(silo, federation, erase).code == "nonce_reused"
    assert len(silo.rows()) == 9


def test_a_ping_answers_without_training(silo: Silo, federation: Federation) -> None:
    assert carry_out(silo, federation, federation.order("ping", revision=0)) == JobReply("ok")
    assert not list((silo.config.state_dir / "adapters").iterdir())


def test_an_order_by_another_coordinator_is_refused(silo: Silo, federation: Federation) -> None:
    forged = sign_job(federation.order("erase"), SigningKey.generate()).to_json()
    assert handle_job(forged, federation.plan_env, silo.config).code == "job_signature_invalid"
    assert len(silo.rows()) == 9


def test_a_plan_by_another_coordinator_is_refused(silo: Silo, federation: Federation) -> None:
    forged = sign_plan(federation.plan, SigningKey.generate()).to_json()
    assert handle_job(federation.signed(federation.order()), forged, silo.config).code == "plan_signature_invalid"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"silo_id": "silo-b"}, "order_for_another_silo"),
        ({"plan_id": "plan-0000000000000000"}, "plan_mismatch"),
        ({"expires_at": utc_text(utc_now() - timedelta(seconds=5))}, "order_expired"),
    ],
)
def test_an_order_that_is_not_for_here_and_now_changes_nothing(
    silo: Silo, federation: Federation, changes: dict[str, Any], code: str
) -> None:
    before = silo.data.read_bytes()
    order = federation.order("erase", issued_at=utc_text(utc_now() - timedelta(hours=1)), **changes)
    reply = carry_out(silo, federation, order)
    assert (reply.status, reply.code, reply.message) == ("error", code, SENTENCES[code])
    assert silo.data.read_bytes() == before


@pytest.mark.parametrize("garbage", [b"", b"\xff\x00", b"{}", b"[" * 100_000])
def test_garbage_is_answered_with_a_sentence(silo: Silo, federation: Federation, garbage: bytes) -> None:
    assert handle_job(garbage, federation.plan_env, silo.config).code == "envelope_malformed"
    assert handle_job(federation.signed(federation.order()), garbage, silo.config).code == "envelope_malformed"


def test_bad_data_goes_back_as_a_code_without_file_line_or_count(
    silo: Silo, federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    silo.data.write_text('{"prompt": "canary-4711\n' * 3)
    reply = carry_out(silo, federation, federation.order())
    assert reply == JobReply("error", "data_invalid", SENTENCES["data_invalid"])
    assert "canary" not in caplog.text
    assert "records.jsonl" not in caplog.text
    noted = json.loads((silo.config.state_dir / "last_error.json").read_text())
    assert noted["code"] == "json_broken"
    assert noted["message"].startswith("records.jsonl:1: ")


def test_an_unforeseen_error_says_nothing_of_what_it_was(
    silo: Silo, federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_args: object, **_more: object) -> None:
        raise RuntimeError("canary-4711 in /secret/path")

    monkeypatch.setattr("silo_client.adapters.obtain_adapter", broken)
    reply = carry_out(silo, federation, federation.order())
    assert reply == JobReply("error", "silo_failed", SENTENCES["silo_failed"])
    assert "canary" not in caplog.text
    assert all(b"canary" not in content for content in silo.everything().values())


def test_a_failed_order_can_be_sent_again_once_the_owner_has_mended_the_data(
    silo: Silo, federation: Federation
) -> None:
    order = federation.order()
    silo.data.write_text("broken\n")
    assert carry_out(silo, federation, order).code == "data_invalid"
    silo.write(rows())
    assert carry_out(silo, federation, order).status == "ok"


def test_a_silo_at_work_answers_busy_after_a_while(
    silo: Silo, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LOCK_WAIT_S", 0.3)
    with silo.state.lock():
        assert carry_out(silo, federation, federation.order()).code == "silo_busy"


def test_the_same_order_delivered_twice_at_once_is_carried_out_once(silo: Silo, federation: Federation) -> None:
    order = federation.order()
    replies: list[JobReply] = []
    workers = [threading.Thread(target=lambda: replies.append(carry_out(silo, federation, order))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert replies[0] == replies[1]
    assert replies[0].status == "ok"


def test_old_bundles_are_not_kept_for_ever(silo: Silo, federation: Federation) -> None:
    orders = [federation.order(revision=n) for n in range(1, 6)]
    for order in orders:
        carry_out(silo, federation, order)
    assert len(list((silo.config.state_dir / "replies").glob("*.sealed"))) == 3
    assert carry_out(silo, federation, orders[0]).code == "reply_destroyed"


def test_every_sentence_that_may_leave_is_fixed_and_names_no_file() -> None:
    for sentence in SENTENCES.values():
        assert "{" not in sentence
        assert "/" not in sentence
