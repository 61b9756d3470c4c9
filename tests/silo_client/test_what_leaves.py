"""A canary stands in every record: it is in nothing that leaves, in no log, and nowhere in the state directory."""

import logging
from collections.abc import Callable

import pytest

from seqr.bundle import open_sealed
from silo_client.adapters import last_adapter
from silo_client.jobs import handle_job
from silo_client.outgoing import build_manifest
from silo_client.report import status, what_leaves

from .conftest import Federation, Silo

CANARY = "canary7f3a"
RECORDS = [
    {
        "key": f"{CANARY}-{n}",
        "subject": f"{CANARY}-subject-{n % 2}",
        "prompt": f"{CANARY} {n}?",
        "completion": f"{n} {CANARY}",
    }
    for n in range(6)
]


@pytest.fixture
def marked(make_silo: Callable[..., Silo]) -> Silo:
    return make_silo(records=RECORDS)


def test_no_canary_in_what_leaves_in_logs_or_in_the_state_directory(
    marked: Silo, federation: Federation, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    needle = CANARY.encode()
    seen: list[bytes] = []
    for order in (
        federation.order(),
        federation.order("erase", subject=f"{CANARY}-subject-0", revision=2),
        federation.order("erase", subject=f"{CANARY}-nobody", revision=3),
    ):
        reply = handle_job(federation.signed(order), federation.plan_env, marked.config)
        seen += [reply.code.encode(), reply.message.encode(), reply.attestation]
        if reply.bundle is not None:
            opened = open_sealed(reply.bundle, federation.sealing)
            seen += [opened.manifest_envelope.payload, opened.manifest_envelope.to_json(), opened.tensors_bytes]
    marked.data.write_text(f'{{"prompt": "{CANARY}')
    handle_job(federation.signed(federation.order(revision=4)), federation.plan_env, marked.config)
    assert not [one for one in seen if needle in one]
    assert not [name for name, content in marked.everything().items() if needle in content or needle in name.encode()]
    assert CANARY not in caplog.text
    printed = capfd.readouterr()
    assert CANARY not in printed.out + printed.err
    assert CANARY not in "\n".join([*status(marked.config, marked.state), *what_leaves(marked.config, marked.state)])


def test_checkpoints_of_an_unfinished_training_hold_no_record(
    marked: Silo, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_args: object, **_more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("silo_client.adapters.export", stop)
    with pytest.raises(KeyboardInterrupt):
        handle_job(federation.signed(federation.order()), federation.plan_env, marked.config)
    remains = marked.everything()
    assert any("checkpoints" in name for name in remains)
    assert not [name for name, content in remains.items() if CANARY.encode() in content]


def test_what_leaves_lists_every_tensor_and_every_field_of_the_manifest(silo: Silo, federation: Federation) -> None:
    before = "\n".join(what_leaves(silo.config, silo.state))
    assert "nothing has been trained yet" in before
    handle_job(federation.signed(federation.order()), federation.plan_env, silo.config)
    listed = "\n".join(what_leaves(silo.config, silo.state))
    trained = last_adapter(silo.state, federation.plan.plan_id)
    assert trained is not None
    for name in trained.adapter.tensors():
        assert f"tensor {name}: " in listed
    for name in build_manifest(trained, silo.config, revision=1, nonce="n").to_dict():
        assert f"manifest {name}: " in listed
    assert "manifest records: not given" in listed


def test_the_state_directory_is_the_owners_alone(silo: Silo, federation: Federation) -> None:
    handle_job(federation.signed(federation.order()), federation.plan_env, silo.config)
    assert silo.config.state_dir.stat().st_mode & 0o777 == 0o700
    for path in silo.config.state_dir.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o077 == 0, path
