"""Nothing of a record leaves the silo's process: not on the wire, not into a log, not into a database."""

import base64
from itertools import pairwise

import pytest

from tests.e2e.recorded import CANARY, Recorded
from tests.e2e.scan import files_with

pytestmark = pytest.mark.e2e


def _disguises(canary: str) -> list[bytes]:
    """The canary as text, UTF-16, hex and at each of base64's three alignments."""
    raw = canary.encode()
    middles = [base64.b64encode(b"x" * shift + raw)[4:-4] for shift in range(3)]
    return [raw, canary.encode("utf-16-le"), raw.hex().encode(), *middles]


def test_the_recording_proxy_would_see_a_leak(recorded: Recorded) -> None:
    assert recorded.organisations[0].silo_id.encode() in recorded.sent
    assert len(recorded.sent) > 10_000


@pytest.mark.parametrize("form", range(6))
def test_no_byte_of_a_record_is_in_what_the_silo_sends(recorded: Recorded, form: int) -> None:
    assert _disguises(CANARY)[form] not in recorded.sent


def test_no_subject_of_a_record_is_in_what_the_silo_sends(recorded: Recorded) -> None:
    for subject in recorded.organisations[0].subjects:
        assert subject.encode() not in recorded.sent


def test_no_token_sequence_of_a_record_is_in_what_the_silo_sends(recorded: Recorded) -> None:
    text = recorded.organisations[0].records[0]["completion"]
    for first, second in pairwise(text.split()):
        if len(first) + len(second) > 12:
            assert f"{first} {second}".encode() not in recorded.sent


def test_no_log_and_no_database_holds_a_record(recorded: Recorded) -> None:
    data = recorded.world.silo(recorded.organisations[0].silo_id) / "data"
    assert files_with(recorded.world.root, CANARY.encode()) == [data / "records.jsonl"]
