import base64
from dataclasses import fields, replace

import pytest

from seqr import dsse
from seqr.canonical import canonical_json
from seqr.job import JOB_PAYLOAD_TYPE
from seqr.plan import (
    PLAN_PAYLOAD_TYPE,
    GatewayKey,
    ModuleSpec,
    Plan,
    PlanMalformed,
    PlanSignatureInvalid,
    TrainingLimits,
    create_plan,
    plan_id_of,
    sign_plan,
    verify_plan,
)


def test_the_same_inputs_give_the_same_plan_for_ever(small_plan):
    fixed = replace(
        small_plan, routing="evidence", gateway_keys=(GatewayKey("gateway", "c2VhbGluZw==", "c2lnbmluZw=="),)
    )
    assert plan_id_of(fixed) == "plan-09560774c896b508"


def test_a_signed_plan_survives_transport(small_plan, coordinator_key):
    envelope = sign_plan(small_plan, coordinator_key)
    received = dsse.Envelope.from_json(envelope.to_json())
    assert verify_plan(received, coordinator_key.public) == small_plan
    assert sign_plan(small_plan, coordinator_key).to_json() == envelope.to_json()


def test_the_scale_is_alpha_over_rank(small_plan):
    assert small_plan.scale == 2.0


def test_a_plan_signed_by_another_key_is_refused(small_plan, coordinator_key, stranger_key):
    with pytest.raises(PlanSignatureInvalid, match=f"pinned coordinator key {coordinator_key.public.key_id}"):
        verify_plan(sign_plan(small_plan, stranger_key), coordinator_key.public)


def test_a_plan_changed_after_signing_is_refused(small_plan, coordinator_key):
    envelope = sign_plan(small_plan, coordinator_key)
    with pytest.raises(PlanSignatureInvalid):
        verify_plan(
            replace(envelope, payload=envelope.payload.replace(b'"seed":11', b'"seed":12')), coordinator_key.public
        )


def test_another_signed_document_cannot_pass_as_a_plan(small_plan, coordinator_key):
    envelope = dsse.sign(JOB_PAYLOAD_TYPE, canonical_json(small_plan.to_dict()), coordinator_key)
    with pytest.raises(dsse.PayloadTypeMismatch):
        verify_plan(envelope, coordinator_key.public)


def test_every_field_is_part_of_the_plan_id(small_plan, other_sealing_key, stranger_key):
    changes = {
        "federation": "other",
        "base_model": "other",
        "base_model_digest": "sha256:" + "00" * 32,
        "modules": small_plan.modules[:1],
        "rank": 2,
        "alpha": 7.0,
        "seed": 12,
        "dtype": "bfloat16",
        "a_digests": {},
        "gateway_keys": (GatewayKey.of(other_sealing_key.public, stranger_key.public),),
        "routing": "per_token",
        "calibration": "own",
        "training": TrainingLimits(max_steps=1),
        "created_at": "2026-03-01T12:00:01Z",
    }
    assert set(changes) == {f.name for f in fields(Plan)} - {"plan_id"}
    ids = {plan_id_of(replace(small_plan, **{name: value})) for name, value in changes.items()}
    assert len(ids | {small_plan.plan_id}) == len(changes) + 1


def test_a_plan_under_another_plans_id_is_refused(small_plan, coordinator_key):
    document = small_plan.to_dict() | {"seed": 12}
    with pytest.raises(PlanMalformed, match="plan_id must be the digest of the plan: expected plan-"):
        verify_plan(dsse.sign(PLAN_PAYLOAD_TYPE, canonical_json(document), coordinator_key), coordinator_key.public)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"surprise": 1}, "unknown 'surprise'"),
        ({"type": "seqr/plan/v2"}, "type must be 'seqr/plan/v1'"),
        ({"a_generator": "mt19937"}, "a_generator must be 'philox4x64-as241-v1', got 'mt19937'"),
        ({"federation": "../etc"}, "federation must be an id"),
        ({"federation": ""}, "federation must be an id"),
        ({"base_model": "a\nb"}, "base_model must be printable text"),
        ({"base_model_digest": "sha256:12"}, "base_model_digest must be 'sha256:'"),
        ({"modules": []}, "at least one module"),
        ({"modules": [{"name": "a", "in_features": 4, "out_features": 4}] * 2}, "each only once"),
        ({"modules": [{"name": "../a", "in_features": 4, "out_features": 4}]}, "dotted attribute names"),
        ({"modules": [{"name": "a", "in_features": 2**40, "out_features": 4}]}, "in_features must be a whole number"),
        ({"modules": [{"name": "a", "in_features": True, "out_features": 4}]}, "in_features must be a whole number"),
        ({"modules": [{"name": "a", "in_features": 4}]}, "missing 'out_features'"),
        ({"modules": "all"}, "modules must be a list"),
        ({"rank": 0}, "rank must be a whole number from 1 to 512, got 0"),
        ({"rank": 9}, "rank 9 is larger than module layers.0.v"),
        ({"rank": 3.0}, "rank must be a whole number"),
        ({"alpha": 0.0}, "alpha must be a number"),
        ({"alpha": 10**400}, "alpha must be a number"),
        ({"alpha": "6"}, "alpha must be a number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 2**63}, "seed must be a whole number"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
        ({"a_digests": {}}, "must name exactly its modules"),
        ({"a_digests": {"layers.0.q": "12"}}, "a_digests must be an object"),
        ({"gateway_keys": []}, "at least one gateway key"),
        (
            {"gateway_keys": [{"key_id": "g", "sealing_key": "AAAA", "signing_key": "AAAA"}]},
            "gateway key g: expected a",
        ),
        ({"routing": "random"}, "routing must be one of prompt_evidence, evidence, per_token"),
        ({"calibration": "none"}, "calibration must be one of public, own"),
        ({"training": None}, "training must be a JSON object"),
        ({"created_at": "2026-03-01"}, "created_at must be a UTC time"),
        ({"created_at": "2026-3-1T12:00:00Z"}, "created_at must be a UTC time"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_malformed_plan_is_refused_with_got_and_expected(small_plan, changes, sentence):
    with pytest.raises(PlanMalformed) as caught:
        Plan.from_dict(small_plan.to_dict() | changes)
    assert sentence in str(caught.value)


def test_two_gateways_may_not_share_a_name(small_plan):
    document = small_plan.to_dict()
    with pytest.raises(PlanMalformed, match="each key_id only once"):
        Plan.from_dict(document | {"gateway_keys": document["gateway_keys"] * 2})


def test_a_training_limit_out_of_range_is_named(small_plan):
    training = small_plan.to_dict()["training"] | {"max_steps": 0}
    with pytest.raises(PlanMalformed, match="the plan's training: max_steps must be a whole number"):
        Plan.from_dict(small_plan.to_dict() | {"training": training})


@pytest.mark.parametrize("payload", [b"", b"[]", b"null", b'{"type":1,"type":2}', b"\xff"])
def test_signed_nonsense_is_refused(payload, coordinator_key):
    with pytest.raises(PlanMalformed):
        verify_plan(dsse.sign(PLAN_PAYLOAD_TYPE, payload, coordinator_key), coordinator_key.public)


def test_an_absurd_plan_is_refused_before_anything_is_drawn(gateway_key):
    with pytest.raises(PlanMalformed, match="rank"):
        create_plan(
            federation="test",
            base_model="none",
            base_model_digest="sha256:" + "ab" * 32,
            modules=[ModuleSpec("a", 1 << 20, 1 << 20)],
            rank=1 << 20,
            alpha=1.0,
            seed=0,
            gateway_keys=[gateway_key],
        )


def test_a_plan_names_its_gateways_by_both_keys(small_plan, gateway_sealing_key, gateway_signing_key):
    key = small_plan.gateway_keys[0]
    assert key.key_id == gateway_sealing_key.public.key_id
    assert base64.b64decode(key.signing_key) and key.signing_key == gateway_signing_key.public.to_b64()
