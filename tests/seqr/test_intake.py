"""One test per attack. The attacker is the strongest there is: a silo that signs whatever it likes with its own key."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from safetensors.torch import save

from seqr import dsse
from seqr.adapter import Adapter, adapter_digest, digests_of
from seqr.bundle import MANIFEST_PAYLOAD_TYPE, Manifest, OpenedBundle, open_sealed, seal, sign_manifest
from seqr.canonical import canonical_json
from seqr.document import utc_text
from seqr.intake import Expectation, adapter_norms, check_bundle
from seqr.refusals import (
    BundleRefused,
    BundleTooLarge,
    BundleUnreadable,
    ManifestExpired,
    ManifestMalformed,
    ManifestSignatureInvalid,
    NonceMismatch,
    NonceReplayed,
    NormOutOfBounds,
    NotFinite,
    QNotOrthonormal,
    RankDegenerate,
    RDiagonalNegative,
    RevisionNotNext,
    RNotUpperTriangular,
    StatisticsInvalid,
    TensorDigestMismatch,
    TensorSetMismatch,
    TensorShapeMismatch,
    TombstonedAdapter,
    WrongPlan,
    WrongSilo,
)

NONCE = "00112233445566778899aabbccddeeff"
Q, R, MU, SIGMA = (f"layers.0.q.{part}" for part in ("q", "r", "mu", "sigma"))


@pytest.fixture
def expectation(silo_key, now) -> Expectation:
    return Expectation("clinic", (silo_key.public,), 3, NONCE, frozenset(), now)


@pytest.fixture
def honest(small_plan, make_adapter) -> Adapter:
    return make_adapter(small_plan)


@pytest.fixture
def upload(small_plan, silo_key, now) -> Callable[..., OpenedBundle]:
    """``upload(tensors, **manifest_changes)``: a bundle whose manifest truly signs these tensors, however bad."""

    def make(tensors: dict[str, torch.Tensor], key=silo_key, **changes) -> OpenedBundle:
        tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        digests = digests_of(tensors)
        manifest = Manifest(
            plan_id=small_plan.plan_id,
            silo_id="clinic",
            revision=3,
            job_nonce=NONCE,
            tensors=digests,
            adapter_digest=adapter_digest(digests),
            records=None,
            tokens=None,
            environment={},
            dataset_root="cc" * 32,
            expires_at=utc_text(now + timedelta(hours=1)),
        )
        return OpenedBundle(sign_manifest(replace(manifest, **changes), key), save(tensors))

    return make


def test_an_honest_bundle_is_admitted_from_seal_to_adapter(
    honest, upload, small_plan, expectation, gateway_key, gateway_sealing_key
):
    blob = seal(honest, upload(honest.tensors()).manifest_envelope, [gateway_key])
    admitted = check_bundle(open_sealed(blob, gateway_sealing_key), small_plan, expectation)
    assert admitted.digest == honest.digest


def test_an_adapter_of_every_linear_of_a_model_is_admitted(make_adapter, upload, tiny_plan, expectation):
    adapter = make_adapter(tiny_plan)
    opened = upload(adapter.tensors(), plan_id=tiny_plan.plan_id)
    assert check_bundle(opened, tiny_plan, expectation).digest == adapter.digest


def refused(error: type[BundleRefused], *words: str):
    """Expect ``error`` with a message that names got and expected."""
    return pytest.raises(error, match=".*".join(words))


# --- sizes and form -------------------------------------------------------------------------------------------------


def test_more_bytes_than_the_plan_allows_are_refused_before_decoding(honest, upload, small_plan, expectation):
    opened = replace(upload(honest.tensors()), tensors_bytes=bytes(1_000_000))
    with refused(BundleTooLarge, "the tensors take 1000000 bytes", "allows"):
        check_bundle(opened, small_plan, expectation)


@pytest.mark.parametrize("data", [b"", b"\x80\x04}", b"\xff" * 100], ids=["empty", "pickle", "garbage"])
def test_bytes_that_are_no_safetensors_are_refused(data, honest, upload, small_plan, expectation):
    with pytest.raises(BundleUnreadable):
        check_bundle(replace(upload(honest.tensors()), tensors_bytes=data), small_plan, expectation)


def test_half_precision_tensors_are_refused(honest, upload, small_plan, expectation):
    with refused(BundleUnreadable, r"layers\.0\.q\.q", "must be F32, got 'F16'"):
        check_bundle(upload(honest.tensors() | {Q: honest.tensors()[Q].half()}), small_plan, expectation)


# --- who ------------------------------------------------------------------------------------------------------------


def test_a_manifest_signed_by_a_stranger_is_refused(honest, upload, small_plan, expectation, stranger_key, silo_key):
    with refused(ManifestSignatureInvalid, f"expected a signature by key {silo_key.public.key_id}"):
        check_bundle(upload(honest.tensors(), key=stranger_key), small_plan, expectation)


def test_a_silo_whose_keys_are_all_revoked_is_refused(honest, upload, small_plan, expectation):
    with refused(ManifestSignatureInvalid, "no key is trusted"):
        check_bundle(upload(honest.tensors()), small_plan, replace(expectation, silo_keys=()))


def test_either_key_of_a_silo_that_rotates_is_accepted(honest, upload, small_plan, expectation, stranger_key):
    both = replace(expectation, silo_keys=(stranger_key.public, *expectation.silo_keys))
    assert check_bundle(upload(honest.tensors()), small_plan, both)


def test_a_manifest_changed_after_signing_is_refused(honest, upload, small_plan, expectation):
    opened = upload(honest.tensors())
    payload = opened.manifest_envelope.payload.replace(b'"revision":3', b'"revision":4')
    changed = replace(opened, manifest_envelope=replace(opened.manifest_envelope, payload=payload))
    with pytest.raises(ManifestSignatureInvalid):
        check_bundle(changed, small_plan, expectation)


def test_another_document_signed_by_the_silo_is_no_manifest(honest, upload, small_plan, expectation, silo_key):
    opened = upload(honest.tensors())
    relabelled = dsse.sign("application/vnd.seqr.erasure+json", opened.manifest_envelope.payload, silo_key)
    with refused(ManifestSignatureInvalid, "expected a signed application/vnd.seqr.manifest"):
        check_bundle(replace(opened, manifest_envelope=relabelled), small_plan, expectation)


@pytest.mark.parametrize("payload", [b"", b"{}", b"[1]", b'{"a":1,"a":1}'])
def test_a_signed_manifest_that_is_nonsense_is_refused(payload, honest, upload, small_plan, expectation, silo_key):
    envelope = dsse.sign(MANIFEST_PAYLOAD_TYPE, payload, silo_key)
    with pytest.raises(ManifestMalformed):
        check_bundle(replace(upload(honest.tensors()), manifest_envelope=envelope), small_plan, expectation)


def test_a_silo_cannot_upload_in_the_name_of_another(honest, upload, small_plan, expectation):
    with refused(WrongSilo, "of silo bank, expected silo clinic"):
        check_bundle(upload(honest.tensors(), silo_id="bank"), small_plan, expectation)


# --- what for, and when ---------------------------------------------------------------------------------------------


def test_an_adapter_of_another_plan_is_refused(honest, upload, small_plan, tiny_plan, expectation):
    with refused(WrongPlan, f"for plan {tiny_plan.plan_id}, expected plan {small_plan.plan_id}"):
        check_bundle(upload(honest.tensors(), plan_id=tiny_plan.plan_id), small_plan, expectation)


def test_an_answer_to_another_job_is_refused(honest, upload, small_plan, expectation):
    with refused(NonceMismatch, f"answers job nonce {'f' * 32}, expected {NONCE}"):
        check_bundle(upload(honest.tensors(), job_nonce="f" * 32), small_plan, expectation)


def test_a_replayed_nonce_is_refused(honest, upload, small_plan, expectation):
    with refused(NonceReplayed, f"{NONCE} of silo clinic has been used already"):
        check_bundle(upload(honest.tensors()), small_plan, replace(expectation, used_nonces=frozenset({NONCE})))


@pytest.mark.parametrize("revision", [1, 2, 4])
def test_a_rolled_back_or_skipped_revision_is_refused(revision, honest, upload, small_plan, expectation):
    with refused(RevisionNotNext, f"is revision {revision}, expected revision 3"):
        check_bundle(upload(honest.tensors(), revision=revision), small_plan, expectation)


def test_an_adapter_destroyed_by_a_deletion_never_returns(honest, upload, small_plan, expectation):
    tombstoned = replace(expectation, tombstoned_digests=frozenset({honest.digest}))
    with refused(TombstonedAdapter, honest.digest, "was destroyed by a deletion"):
        check_bundle(upload(honest.tensors()), small_plan, tombstoned)


def test_a_tombstoned_adapter_under_a_false_digest_is_refused(honest, upload, small_plan, expectation):
    tombstoned = replace(expectation, tombstoned_digests=frozenset({honest.digest}))
    with refused(TensorDigestMismatch, f"digest is {honest.digest}, the manifest claims {'0' * 64}"):
        check_bundle(upload(honest.tensors(), adapter_digest="0" * 64), small_plan, tombstoned)


def test_an_expired_manifest_is_refused_from_its_last_moment_on(honest, upload, small_plan, expectation, now):
    opened = upload(honest.tensors())
    end = now + timedelta(hours=1)
    assert check_bundle(opened, small_plan, replace(expectation, now=end - timedelta(seconds=1)))
    with refused(ManifestExpired, "expired at 2026-03-01T13:00:00Z, it is 2026-03-01T13:00:00"):
        check_bundle(opened, small_plan, replace(expectation, now=end))


def test_a_revision_admitted_before_may_return_after_a_restart_but_not_after_a_deletion(
    honest, upload, small_plan, expectation, now
):
    later = replace(expectation, now=now + timedelta(days=30), already_admitted=True)
    assert check_bundle(upload(honest.tensors()), small_plan, later)
    with pytest.raises(TombstonedAdapter):
        check_bundle(
            upload(honest.tensors()), small_plan, replace(later, tombstoned_digests=frozenset({honest.digest}))
        )


# --- which tensors --------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_tensor_is_refused_by_name(honest, upload, small_plan, expectation):
    opened = upload(honest.tensors())
    start = 8 + int.from_bytes(opened.tensors_bytes[:8], "little")
    for position in range(start, len(opened.tensors_bytes), 5):
        changed = bytearray(opened.tensors_bytes)
        changed[position] ^= 1
        with refused(TensorDigestMismatch, r"tensor 'layers\.0\.", "the manifest has digest", "the payload"):
            check_bundle(replace(opened, tensors_bytes=bytes(changed)), small_plan, expectation)


def test_a_flipped_byte_in_the_tensor_header_is_refused(honest, upload, small_plan, expectation):
    opened = upload(honest.tensors())
    for position in range(8 + int.from_bytes(opened.tensors_bytes[:8], "little")):
        changed = bytearray(opened.tensors_bytes)
        changed[position] ^= 1
        with pytest.raises(BundleRefused):
            check_bundle(replace(opened, tensors_bytes=bytes(changed)), small_plan, expectation)


def test_tensors_of_another_adapter_are_refused(honest, upload, make_adapter, small_plan, expectation):
    other = make_adapter(small_plan, seed=1)
    mixed = replace(upload(honest.tensors()), tensors_bytes=other.to_bytes())
    with pytest.raises(TensorDigestMismatch):
        check_bundle(mixed, small_plan, expectation)


def test_tensors_swapped_between_modules_are_refused(honest, upload, small_plan, expectation):
    tensors = honest.tensors()
    swapped = tensors | {MU: tensors["layers.0.v.mu"], "layers.0.v.mu": tensors[MU]}
    with refused(TensorDigestMismatch, r"layers\.0\.q\.mu"):
        check_bundle(replace(upload(tensors), tensors_bytes=save(swapped)), small_plan, expectation)


def test_a_missing_tensor_is_refused(honest, upload, small_plan, expectation):
    tensors = honest.tensors()
    del tensors[SIGMA]
    with refused(TensorSetMismatch, "1 tensors of plan", "are missing, first 'layers.0.q.sigma'"):
        check_bundle(upload(tensors), small_plan, expectation)


def test_a_missing_module_is_refused(honest, upload, small_plan, expectation):
    tensors = {name: tensor for name, tensor in honest.tensors().items() if not name.startswith("layers.0.v")}
    with refused(TensorSetMismatch, "4 tensors of plan", "are missing"):
        check_bundle(upload(tensors), small_plan, expectation)


@pytest.mark.parametrize("name", ["lm_head.q", "layers.0.q.bias", "", "x" * 900])
def test_an_extra_tensor_is_refused(name, honest, upload, small_plan, expectation):
    with refused(TensorSetMismatch, "1 tensors are not in plan"):
        check_bundle(upload(honest.tensors() | {name: torch.zeros(1)}), small_plan, expectation)


def test_a_tensor_that_the_manifest_does_not_list_is_refused(honest, upload, small_plan, expectation):
    opened = upload(honest.tensors())
    smuggled = replace(opened, tensors_bytes=save(honest.tensors() | {"extra": torch.zeros(1)}))
    with refused(TensorDigestMismatch, "'extra': the manifest has digest none"):
        check_bundle(smuggled, small_plan, expectation)


@pytest.mark.parametrize(
    ("name", "shape"), [(Q, (16, 4)), (Q, (8, 3)), (Q, (48,)), (R, (3, 4)), (R, (1, 1)), (MU, (1,)), (SIGMA, (0,))]
)
def test_a_wrong_shape_is_refused(name, shape, honest, upload, small_plan, expectation):
    with refused(TensorShapeMismatch, name.replace(".", r"\."), "has shape", "expected"):
        check_bundle(upload(honest.tensors() | {name: torch.ones(shape)}), small_plan, expectation)


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [Q, R, MU, SIGMA])
def test_a_value_that_is_not_finite_is_refused(name, value, honest, upload, small_plan, expectation):
    tensors = honest.tensors()
    poisoned = tensors[name].clone()
    poisoned.view(-1)[-1] = value
    with refused(NotFinite, name.replace(".", r"\."), "not finite, expected finite"):
        check_bundle(upload(tensors | {name: poisoned}), small_plan, expectation)


def _with(adapter: Adapter, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = adapter.tensors()
    return tensors | {name: change(tensors[name].clone())}


def test_an_r_with_a_lower_triangle_is_refused(honest, upload, small_plan, expectation):
    def add(r: torch.Tensor) -> torch.Tensor:
        r[2, 0] = 1e-4 * torch.linalg.matrix_norm(r)
        return r

    with refused(RNotUpperTriangular, r"module layers\.0\.q: R has", "below the diagonal, expected at most"):
        check_bundle(upload(_with(honest, R, add)), small_plan, expectation)


def test_a_negative_diagonal_is_refused_so_that_an_adapter_has_one_digest(honest, upload, small_plan, expectation):
    # The same function of x with other bytes: a tombstoned adapter in disguise.
    tensors = honest.tensors()
    flip = torch.tensor([1.0, -1.0, 1.0])
    disguised = tensors | {Q: tensors[Q] * flip, R: flip[:, None] * tensors[R]}
    with refused(RDiagonalNegative, "on its diagonal, expected no negative entry"):
        check_bundle(upload(disguised), small_plan, expectation)


@pytest.mark.parametrize(
    "change",
    [lambda q: q * 10, lambda q: q * 1.0001, lambda q: torch.zeros_like(q), lambda q: q[:, [0, 0, 1]], torch.ones_like],
    ids=["ten times", "slightly longer", "zero", "one column twice", "ones"],
)
def test_a_q_whose_columns_are_not_orthonormal_is_refused(change, honest, upload, small_plan, expectation):
    with refused(QNotOrthonormal, r"Q\^T Q is off the identity by", "expected at most 1e-05"):
        check_bundle(upload(_with(honest, Q, change)), small_plan, expectation)


def test_a_huge_norm_is_refused(honest, upload, small_plan, expectation):
    with refused(NormOutOfBounds, r"\|\|R\|\| is", "expected at most"):
        check_bundle(upload(_with(honest, R, lambda r: r * 1e6)), small_plan, expectation)


def norms_of(adapters: Iterable[Adapter]) -> dict[str, list[float]]:
    each = [adapter_norms(adapter) for adapter in adapters]
    return {name: [norms[name] for norms in each] for name in each[0]}


@pytest.mark.parametrize("factor", [50.0, 0.02])
def test_a_norm_far_from_all_other_silos_is_refused(factor, honest, upload, make_adapter, small_plan, expectation):
    norms = norms_of(make_adapter(small_plan, seed) for seed in range(1, 6))
    assert check_bundle(upload(honest.tensors()), small_plan, expectation, norms)
    with refused(NormOutOfBounds, "expected", "as the 5 other adapters in the library have"):
        check_bundle(upload(_with(honest, R, lambda r: r * factor)), small_plan, expectation, norms)


def test_too_few_peers_say_nothing_about_a_norm(honest, upload, make_adapter, small_plan, expectation):
    norms = norms_of(make_adapter(small_plan, seed) for seed in (1, 2))
    assert check_bundle(upload(_with(honest, R, lambda r: r * 50)), small_plan, expectation, norms)


def test_a_single_direction_is_refused(honest, upload, small_plan, expectation):
    def first_row_only(r: torch.Tensor) -> torch.Tensor:
        r[1:] = 0
        return r

    with refused(RankDegenerate, "R has rank 1, expected more of rank 3"):
        check_bundle(upload(_with(honest, R, first_row_only)), small_plan, expectation)


def test_an_adapter_that_learned_nothing_is_refused(honest, upload, small_plan, expectation):
    with refused(RankDegenerate, "R is zero, expected a trained adapter"):
        check_bundle(upload(_with(honest, R, torch.zeros_like)), small_plan, expectation)


@pytest.mark.parametrize("value", [0.0, -1.0, -0.0])
@pytest.mark.parametrize("name", [MU, SIGMA])
def test_statistics_that_are_not_positive_are_refused(name, value, honest, upload, small_plan, expectation):
    label = name.rpartition(".")[2]
    with refused(StatisticsInvalid, f"module layers.0.q: {label} is", "expected a positive number"):
        check_bundle(upload(_with(honest, name, lambda t: t * 0 + value)), small_plan, expectation)


# --- all of them ----------------------------------------------------------------------------------------------------


def test_every_refusal_has_a_code_of_its_own():
    classes = [BundleRefused, *BundleRefused.__subclasses__()]
    assert len({cls.code for cls in classes}) == len(classes) >= 23


def test_the_first_broken_rule_is_the_one_named(honest, upload, small_plan, expectation, now):
    # Signature before freshness before content: what a stranger sent is not looked at any further.
    bad = _with(honest, Q, lambda q: q * 10)
    late = replace(expectation, now=now + timedelta(days=1))
    with pytest.raises(ManifestExpired):
        check_bundle(upload(bad), small_plan, late)
    with pytest.raises(WrongSilo):
        check_bundle(upload(bad, silo_id="bank"), small_plan, late)
    with pytest.raises(ManifestSignatureInvalid):
        check_bundle(upload(bad, silo_id="bank"), small_plan, replace(late, silo_keys=()))


def test_checking_changes_nothing_in_what_it_was_given(honest, upload, small_plan, expectation):
    opened = upload(honest.tensors())
    before = (opened.manifest_envelope.to_json(), opened.tensors_bytes, canonical_json(small_plan.to_dict()))
    check_bundle(opened, small_plan, expectation)
    assert (opened.manifest_envelope.to_json(), opened.tensors_bytes, canonical_json(small_plan.to_dict())) == before
