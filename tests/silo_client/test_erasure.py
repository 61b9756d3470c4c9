"""Erasing a subject: the silo afterwards is the silo that never had the records."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seqr.dsse import Envelope
from seqr.job import ErasureAttestation, verify_attestation
from silo_client.adapters import current_corpus, obtain_adapter
from silo_client.config import load_config
from silo_client.errors import DataError, SubjectErased, SubjectUnknown
from silo_client.forget import forget_subject
from silo_client.jobs import JobReply, handle_job

from .conftest import Federation, Silo, rows

OTHERS = [row for row in rows() if row["subject"] != "ann"]


def carry_out(silo: Silo, federation: Federation, order: Any) -> JobReply:
    return handle_job(federation.signed(order), federation.plan_env, silo.config)


def claim(reply: JobReply, silo: Silo) -> ErasureAttestation:
    return verify_attestation(Envelope.from_json(reply.attestation), [silo.state.signing_key().public])


def with_salt_of(silo: Silo, other: Silo) -> Silo:
    shutil.copy(other.config.state_dir / "salt", silo.config.state_dir / "salt")
    return silo


def test_erasing_gives_the_bytes_of_never_having_had_the_records(
    make_silo: Callable[..., Silo], federation: Federation
) -> None:
    silo = make_silo("had")
    never = with_salt_of(make_silo("never", records=OTHERS), silo)
    old = obtain_adapter(silo.config, silo.state, federation.plan)
    reply = carry_out(silo, federation, federation.order("erase"))
    innocent = obtain_adapter(never.config, never.state, federation.plan)
    attested = claim(reply, silo)
    assert reply.status == "ok"
    assert attested.new_adapter_digest == innocent.adapter.digest
    assert attested.dataset_root_after == innocent.dataset_root
    assert attested.old_adapter_digest == old.adapter.digest
    assert attested.dataset_root_before == old.dataset_root
    assert attested.records_removed == 3
    assert silo.rows() == OTHERS
    kept = obtain_adapter(silo.config, silo.state, federation.plan)
    assert kept.adapter.to_bytes() == innocent.adapter.to_bytes()


def test_nothing_made_with_the_records_is_left(silo: Silo, federation: Federation) -> None:
    trained = carry_out(silo, federation, federation.order())
    assert trained.bundle is not None
    old = obtain_adapter(silo.config, silo.state, federation.plan).adapter
    (interrupted := silo.config.state_dir / "checkpoints" / "x").mkdir()
    (interrupted / "adapter_model.safetensors").write_bytes(old.to_bytes())
    factors = [t.numpy().tobytes() for name, t in old.tensors().items() if name.endswith((".q", ".r"))]
    windows = {content[start : start + 64] for content in factors for start in range(0, len(content) - 63, 64)}
    # After its header, which says for whom it is sealed and is alike in every bundle.
    windows |= {trained.bundle[start : start + 64] for start in range(4096, len(trained.bundle) - 63, 640)}
    assert sum(window in content for window in windows for content in silo.everything().values()) >= len(windows)
    carry_out(silo, federation, federation.order("erase", revision=2))
    assert not [window for window in windows for content in silo.everything().values() if window in content]


def test_an_order_answered_before_the_erasure_is_not_answered_with_the_old_adapter_again(
    silo: Silo, federation: Federation
) -> None:
    first = federation.order()
    carry_out(silo, federation, first)
    carry_out(silo, federation, federation.order("erase", revision=2))
    assert carry_out(silo, federation, first).code == "reply_destroyed"


def test_an_unknown_subject_changes_nothing(silo: Silo, federation: Federation) -> None:
    carry_out(silo, federation, federation.order())
    before = {name: content for name, content in silo.everything().items() if "/jobs/" not in name}
    reply = carry_out(silo, federation, federation.order("erase", subject="zoe", revision=2))
    assert (reply.status, reply.code, reply.attestation, reply.bundle) == ("error", "subject_unknown", b"", None)
    after = {name: content for name, content in silo.everything().items() if "/jobs/" not in name}
    after.pop("state/last_error.json")
    assert after == before
    assert silo.rows() == rows()


def test_a_subject_is_compared_whole(make_silo: Callable[..., Silo], federation: Federation) -> None:
    silo = make_silo(records=[{**rows(1)[0], "subject": "anna"}])
    with pytest.raises(SubjectUnknown):
        forget_subject(silo.config, silo.state, "ann")


def test_rows_of_an_erased_subject_cannot_come_back(silo: Silo, federation: Federation) -> None:
    carry_out(silo, federation, federation.order("erase"))
    silo.write(rows())
    with pytest.raises(SubjectErased, match=r"records.jsonl:1: .* records were erased"):
        obtain_adapter(silo.config, silo.state, federation.plan)
    assert carry_out(silo, federation, federation.order(revision=2)).code == "data_invalid"
    forget_subject(silo.config, silo.state, "ann")
    assert silo.rows() == OTHERS


def test_all_other_bytes_of_the_file_and_its_mode_stay_as_they_were(
    make_silo: Callable[..., Silo], federation: Federation
) -> None:
    silo = make_silo()
    lines = [line + b"\r\n" for line in silo.data.read_bytes().splitlines()]
    content = b"\xef\xbb\xbf" + b"".join(lines[1:4]) + b"\n  \n" + b"".join(lines[4:])
    silo.data.write_bytes(content)
    silo.data.chmod(0o640)
    forget_subject(silo.config, silo.state, "ann")
    gone = [line for line in lines if b'"ann"' in line]
    expected = content
    for line in gone:
        expected = expected.replace(line, b"")
    assert silo.data.read_bytes() == expected
    assert silo.data.stat().st_mode & 0o777 == 0o640


def test_rows_of_a_csv_that_run_over_several_lines_go_whole(
    make_silo: Callable[..., Silo], federation: Federation
) -> None:
    silo = make_silo()
    path = silo.directory / "records.csv"
    path.write_bytes(b'subject,prompt,completion\nann,"a\nb ""c""",d\n"bob","e\r\nf",g\nann,h,i\n')
    settings = silo.directory / "silo.toml"
    head = settings.read_text().partition("[[data]]")[0]
    settings.write_text(head + '[[data]]\npath = "records.csv"\nsubject_column = "subject"\n')
    forget_subject(load_config(silo.directory), silo.state, "ann")
    assert path.read_bytes() == b'subject,prompt,completion\n"bob","e\r\nf",g\n'


def test_a_broken_row_that_names_the_subject_goes_too(silo: Silo, federation: Federation) -> None:
    silo.data.write_text(
        silo.data.read_text() + '{"subject": "ann", "prompt": "half a row\n{"subject": "bob", broken\n'
    )
    config = silo.config.model_copy(update={"skip_bad": True})
    reply = handle_job(federation.signed(federation.order("erase")), federation.plan_env, config)
    assert reply.status == "ok"
    assert claim(reply, silo).records_removed == 4
    assert "ann" not in silo.data.read_text()
    assert "broken" in silo.data.read_text()


def test_a_file_that_an_erasure_emptied_is_no_mistake(silo: Silo, federation: Federation) -> None:
    other = silo.directory / "more.jsonl"
    other.write_text("".join(json.dumps({**row, "key": f"m{row['key']}", "subject": "dan"}) + "\n" for row in rows()))
    silo.write([row for row in rows() if row["subject"] == "ann"])
    settings = silo.directory / "silo.toml"
    settings.write_text(
        settings.read_text() + '[[data]]\npath = "more.jsonl"\nsubject_column = "subject"\nkey_column = "key"\n'
    )
    config = load_config(silo.directory)
    reply = handle_job(federation.signed(federation.order("erase")), federation.plan_env, config)
    assert reply.status == "ok"
    assert silo.data.read_bytes() == b""
    assert obtain_adapter(config, silo.state, federation.plan).reused


def test_erasing_the_last_record_is_attested_and_leaves_no_adapter(
    make_silo: Callable[..., Silo], federation: Federation
) -> None:
    silo = make_silo(records=[row for row in rows() if row["subject"] == "ann"])
    carry_out(silo, federation, federation.order())
    reply = carry_out(silo, federation, federation.order("erase", revision=2))
    assert (reply.status, reply.code, reply.bundle) == ("ok", "no_records_left", None)
    assert claim(reply, silo).new_adapter_digest is None
    assert claim(reply, silo).old_adapter_digest is not None
    assert not list((silo.config.state_dir / "adapters").iterdir())


def test_a_subject_that_the_owner_had_forgotten_already_is_attested_not_unknown(
    silo: Silo, federation: Federation
) -> None:
    carry_out(silo, federation, federation.order())
    old = obtain_adapter(silo.config, silo.state, federation.plan)
    forget_subject(silo.config, silo.state, "ann")
    reply = carry_out(silo, federation, federation.order("erase", revision=2))
    assert reply.status == "ok"
    assert claim(reply, silo).old_adapter_digest == old.adapter.digest
    assert claim(reply, silo).records_removed == 3


def test_a_second_order_for_the_same_subject_finishes_what_the_first_began(
    silo: Silo, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry_out(silo, federation, federation.order())
    with monkeypatch.context() as patched:
        patched.setattr("silo_client.adapters._train", _die)
        with pytest.raises(Killed):
            carry_out(silo, federation, federation.order("erase", revision=2))
    reply = carry_out(silo, federation, federation.order("erase", revision=3))
    assert reply.status == "ok"
    assert claim(reply, silo).records_removed == 3
    assert claim(reply, silo).dataset_root_before != claim(reply, silo).dataset_root_after


def test_nothing_is_erased_while_a_data_file_cannot_be_read(silo: Silo, federation: Federation) -> None:
    settings = silo.directory / "silo.toml"
    settings.write_text(settings.read_text() + '[[data]]\npath = "gone.jsonl"\nsubject_column = "subject"\n')
    config = load_config(silo.directory)
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        forget_subject(config, silo.state, "ann")
    assert silo.rows() == rows()


def test_a_file_that_changes_while_it_is_rewritten_is_left_alone(
    silo: Silo, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def append(*_args: object) -> None:
        with silo.data.open("a") as file:
            file.write('{"late": "row"}\n')

    monkeypatch.setattr("silo_client.erasure._keep_owner", append)
    with pytest.raises(DataError, match="changed during the erasure") as caught:
        forget_subject(silo.config, silo.state, "ann")
    assert caught.value.code == "data_file_busy"
    assert len(silo.rows()) == 10


class Killed(BaseException):
    """Stands for kill -9: no handler of the product may catch it."""


def _die(*_args: object, **_more: object) -> None:
    raise Killed


def test_killed_between_any_two_steps_the_same_order_ends_in_the_same_result(
    make_silo: Callable[..., Silo], federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every change of a name on the disk is a step; the erasure is stopped before each of them in turn."""
    quick = replace(federation, plan=federation.plan)
    reference = make_silo("reference")
    carry_out(reference, quick, quick.order())
    wanted = claim(carry_out(reference, quick, quick.order("erase", revision=2)), reference)
    monkeypatch.setattr("silo_client.adapters._train", _remembered_training(quick))
    outcomes = 0
    for step in range(1, 100):
        silo = with_salt_of(make_silo(f"silo-{step}"), reference)
        carry_out(silo, quick, quick.order())
        order = quick.order("erase", revision=2)
        with monkeypatch.context() as patched:
            counter = _KillAt(step)
            for owner, name in ((os, "replace"), (os, "unlink"), (shutil, "rmtree"), (Path, "unlink")):
                patched.setattr(owner, name, counter.before(getattr(owner, name)))
            try:
                carry_out(silo, quick, order)
                finished = True
            except Killed:
                finished = False
        reply = carry_out(silo, quick, order)
        got = claim(reply, silo)
        assert reply.status == "ok", f"killed before step {step}"
        for name in ("removed_commitments", "dataset_root_before", "dataset_root_after", "old_adapter_digest",
                     "new_adapter_digest", "records_removed"):  # fmt: skip
            assert getattr(got, name) == getattr(wanted, name), f"{name}, killed before step {step}"
        assert silo.rows() == OTHERS
        outcomes += 1
        if finished:
            break
    assert outcomes > 10, "the erasure has fewer steps than it must have"


class _KillAt:
    def __init__(self, step: int) -> None:
        self._left = step

    def before(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                raise Killed
            return real(*args, **more)

        return call


def _remembered_training(federation: Federation) -> Callable[..., Any]:
    """Real training, but only once for each set of records: its repeatability has tests of its own."""
    from silo_client import adapters

    real, known = adapters._train, {}

    def train(config: Any, plan: Any, corpus: Any, *rest: Any) -> Any:
        if corpus.root not in known:
            known[corpus.root] = real(config, plan, corpus, *rest)
        return known[corpus.root]

    return train


def test_the_corpus_root_does_not_know_the_order_of_rows(silo: Silo, federation: Federation) -> None:
    first = current_corpus(silo.config, silo.state, federation.plan).root
    silo.write(rows()[::-1])
    assert current_corpus(silo.config, silo.state, federation.plan).root == first
