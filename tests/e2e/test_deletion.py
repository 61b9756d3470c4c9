"""A person's records are deleted: what the receipt says is so, seen from outside."""

import json

import pytest
from safetensors import safe_open

from coordinator.demo import chapters
from tests.e2e.recorded import Recorded
from tests.e2e.scan import files_with_any, windows

pytestmark = pytest.mark.e2e

DELETION_TIMEOUT_S = 240.0


def _adapter_windows(recorded: Recorded, silo_id: str) -> list[bytes]:
    """Windows of every Q and R that the silo keeps in clear, as they lie in its files."""
    found = []
    for path in (recorded.world.silo(silo_id) / "state" / "adapters").rglob("*.safetensors"):
        with safe_open(path, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safe_open handle is no dictionary
                if name.endswith((".q", ".r")):
                    found += windows(tensors.get_tensor(name).tobytes(), 8)
    return found


def test_after_a_deletion_no_file_holds_the_old_adapter_and_the_receipt_verifies(recorded: Recorded) -> None:
    federation, organisation = recorded.federation, recorded.organisations[0]
    silo_id, subject = organisation.silo_id, organisation.subjects[0]
    old = federation.active()[silo_id]
    secrets = _adapter_windows(recorded, silo_id)
    silo = recorded.world.silo(silo_id)
    before = files_with_any(recorded.world.root, secrets)
    assert len(secrets) > 100
    assert before
    assert all(path.is_relative_to(silo) for path in before)

    officer = federation.client(federation.add_user("paul", "privacy_officer", "deletions"))
    filed = officer.post(
        "/v1/deletion-requests", json={"silo_id": silo_id, "subject": subject, "reason": "asked for it"}
    ).json()
    assert filed["state"] in {"quarantined", "waiting_for_silo"}
    path = f"/v1/deletion-requests/{filed['request_id']}"
    recorded.world.wait(
        "the receipt", lambda: officer.get(path).json()["state"] in {"certified", "failed"}, DELETION_TIMEOUT_S
    )
    states = [step["to_state"] for step in officer.get(path).json()["history"]]
    order = ["quarantined", "data_removed", "retraining", "validating", "published", "purged", "certified"]
    assert [state for state in states if state in order] == order

    assert files_with_any(recorded.world.root, secrets) == []
    kept = (silo / "data" / "records.jsonl").read_text()
    assert subject not in kept
    new = federation.active()[silo_id]
    assert (new["revision"], new["adapter_digest"]) != (old["revision"], old["adapter_digest"])

    receipt = recorded.world.root / "receipt.json"
    receipt.write_bytes(officer.get(f"{path}/receipt").content)
    keys = chapters.public_keys(federation, organisation)
    assert "valid" in recorded.world.seqr("receipt", "verify", str(receipt), *keys).lower()
    forged = json.loads(receipt.read_text())
    forged["payload"] = forged["payload"][:-8] + "AAAAAAA="
    receipt.write_text(json.dumps(forged))
    with pytest.raises(Exception, match="signature"):
        recorded.world.seqr("receipt", "verify", str(receipt), *keys)


def test_a_deletion_for_an_unknown_subject_changes_nothing(recorded: Recorded) -> None:
    federation, silo_id = recorded.federation, recorded.organisations[1].silo_id
    before = federation.active()[silo_id]
    officer = federation.client(federation.add_user("pia", "privacy_officer", "deletions"))
    filed = officer.post(
        "/v1/deletion-requests", json={"silo_id": silo_id, "subject": "Nobody Atall", "reason": "asked for it"}
    ).json()
    path = f"/v1/deletion-requests/{filed['request_id']}"
    recorded.world.wait(
        "the end", lambda: officer.get(path).json()["state"] in {"rejected", "certified"}, DELETION_TIMEOUT_S
    )
    ended = officer.get(path).json()
    assert (ended["state"], ended["code"]) == ("rejected", "subject_unknown")
    assert federation.active()[silo_id] == before
    assert silo_id in str(federation.get("/v1/silos"))
