"""The demo's chapters: training, asking, revoking, deleting. Each says what it did and what came back."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.demo.federation import Federation
from coordinator.demo.organisations import Organisation, Question
from coordinator.demo.questions import Analyst, Score, score
from coordinator.demo.story import Story

DELETION_TIMEOUT_S = 600.0
JOINING_AT_ONCE = 4
TRAINING_AT_ONCE = 4
TRAINING_TIMEOUT_S = 1800.0


@dataclass
class Cast:
    """Who takes part: organisations, and the analysts with their keys."""

    organisations: tuple[Organisation, ...]
    analysts: dict[str, Analyst] = field(default_factory=dict)
    grants: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def questions(self) -> list[Question]:
        """Every organisation's questions."""
        return [question for organisation in self.organisations for question in organisation.questions]


def found(story: Story, federation: Federation) -> None:
    """Keys, certificates, databases, plan; then the services start."""
    story.chapter("A federation is founded")
    federation.initialise()
    plan = federation.plan_choice
    story.say(
        f"Plan: base model {federation.model.name}, {plan.targets} Linears, rank {plan.rank}, {plan.max_steps} steps "
        f"of {plan.batch_size} records, {plan.dtype}; A is drawn from the plan's seed and never sent."
    )
    federation.start_services()
    story.say(f"Coordinator at {federation.world.coordinator_url}, gateway at {federation.world.gateway_url}.")


def train(story: Story, federation: Federation, cast: Cast) -> None:
    """Silos enrol, an admin approves them, each trains beside its data and hands in a sealed adapter."""
    story.chapter("Data owners join and train beside their data")

    def join(organisation: Organisation) -> None:
        federation.approve(organisation.silo_id, federation.enrol(organisation))

    with ThreadPoolExecutor(JOINING_AT_ONCE) as pool:
        list(pool.map(join, cast.organisations))
    # A gateway that calibrates with all processor cores and silos that train on them would hold each other up.
    federation.wait_for_gateway()
    silo_ids = [organisation.silo_id for organisation in cast.organisations]
    for silo_id in silo_ids:
        federation.start_silo(silo_id)
    story.say(f"{len(silo_ids)} silos enrolled, were approved by fingerprint, and are told to train.")
    # All on one machine: each training holds the base model in memory.
    for start in range(0, len(silo_ids), TRAINING_AT_ONCE):
        together = silo_ids[start : start + TRAINING_AT_ONCE]
        for silo_id in together:
            federation.train(silo_id)
        federation.wait_active(together, timeout_s=TRAINING_TIMEOUT_S)
    active = federation.active()
    story.table(
        "What left the silos: one sealed bundle each",
        ("silo", "records kept at home", "sealed bytes", "adapter digest"),
        [
            (
                organisation.display_name,
                str(len(organisation.records)),
                f"{active[organisation.silo_id]['sealed_bytes']:,}",
                active[organisation.silo_id]["adapter_digest"][:16],
            )
            for organisation in cast.organisations
        ],
    )
    federation.wait_for_gateway()


def grant(story: Story, federation: Federation, cast: Cast) -> None:
    """Four analysts: alice has all silos, bob the first alone, carol all but the first, mallory none."""
    story.chapter("An admin says who may use which silo")
    silo_ids = [organisation.silo_id for organisation in cast.organisations]
    holdings = {"alice": silo_ids, "bob": silo_ids[:1], "carol": silo_ids[1:], "mallory": []}
    for user, silos in holdings.items():
        key = federation.add_user(user, "analyst", "chat")
        cast.analysts[user] = Analyst(federation.world.gateway_url, key, federation.model.name)
        for silo_id in silos:
            cast.grants[user, silo_id] = federation.grant(user, silo_id, "needs it for the quarterly report")
        story.say(f"{user:<8} may use {', '.join(silos) if silos else 'nothing'}")


def ask(story: Story, cast: Cast) -> dict[str, Score]:
    """Every fact in an untrained phrasing, by the permitted and by the forbidden, in both routing modes."""
    story.chapter("Analysts ask, in a phrasing that was never trained")
    _show_one(story, cast)
    questions, first = cast.questions, cast.organisations[0]
    others = [q for q in questions if q.silo_id != first.silo_id]
    # Facts come three a person: a step that three divides would ask about one kind only.
    sample = questions[::5]
    alice, bob, carol, mallory = (cast.analysts[name] for name in ("alice", "bob", "carol", "mallory"))
    scores = {
        "permitted": score(questions, alice.ask_all(questions)),
        "per_token": score(questions[::4], alice.ask_all(questions[::4], "per_token")),
        "forbidden to bob": score(others, bob.ask_all(others)),
        "forbidden to carol": score(list(first.questions), carol.ask_all(first.questions)),
        "nothing permitted": score(sample, mallory.ask_all(sample)),
    }
    titles = {
        "permitted": "alice, all silos, evidence of the prompt",
        "per_token": "alice, every fourth of them, per-token SEQR",
        "forbidden to bob": f"bob, facts of silos he may not use (has {first.silo_id})",
        "forbidden to carol": f"carol, facts of {first.silo_id} (has all others)",
        "nothing permitted": "mallory, no silo at all (base model)",
    }
    story.table(
        "Facts right, and the share of the answers' (token, layer) choices that went to the silo that owns the fact",
        ("who asked", "right", "of", "percent", "owner's share"),
        [
            (titles[name], str(s.right), str(s.asked), f"{s.percent:.0f}%", f"{100 * s.owner_share:.0f}%")
            for name, s in scores.items()
        ],
    )
    return scores


def revoke(story: Story, federation: Federation, cast: Cast) -> None:
    """A grant ends; the next question no longer reaches the silo."""
    story.chapter("A grant is revoked")
    organisation = cast.organisations[1]
    question = organisation.questions[0]
    before = cast.analysts["carol"].ask(question.text)
    federation.revoke(cast.grants["carol", organisation.silo_id], "left the project")
    after = cast.analysts["carol"].ask(question.text)
    story.quote("carol", question.text)
    story.quote("before", before.text)
    story.quote("after", after.text)
    story.say(
        f"Policy version {before.policy_version} became {after.policy_version}; carol may now use "
        f"{', '.join(after.permitted) or 'nothing'}."
    )


def delete(story: Story, federation: Federation, cast: Cast) -> Path:
    """A person's records are deleted: quarantine, retraining, the old adapter's end, the receipt."""
    story.chapter("A person asks to be forgotten")
    world, organisation = federation.world, cast.organisations[0]
    subject = organisation.subjects[0]
    own = [q for q in organisation.questions if q.subject == subject] or list(organisation.questions[:1])
    rest = [q for q in organisation.questions if q not in own][::2]
    alice = cast.analysts["alice"]
    before = score(own, alice.ask_all(own))
    old = federation.active()[organisation.silo_id]["adapter_digest"]
    officer = federation.client(federation.add_user("petra", "privacy_officer", "deletions"))
    filed = officer.post(
        "/v1/deletion-requests",
        json={"silo_id": organisation.silo_id, "subject": subject, "reason": "erasure, GDPR article 17"},
    ).json()
    at_once = alice.ask(own[0].text)
    story.say(f"petra files a request for {subject} at {organisation.display_name}; due {filed['due_at'][:10]}.")
    story.say(f"The silo was out of routing when the request returned: alice may use {', '.join(at_once.permitted)}.")
    request = f"/v1/deletion-requests/{filed['request_id']}"
    closed = world.wait("the receipt", _closed(lambda: officer.get(request).json()), DELETION_TIMEOUT_S)
    story.table(
        "What happened to the request",
        ("state", "at"),
        [(step["to_state"], step["at"][11:19]) for step in closed["history"]],
    )
    if closed["state"] != "certified":
        story.say(f"The request ended as {closed['state']}: {closed.get('message')}")
        return world.root
    receipt = world.root / "receipt.json"
    receipt.write_bytes(officer.get(f"{request}/receipt").content)
    story.say(world.seqr("receipt", "verify", str(receipt), *public_keys(federation, organisation)).strip())
    federation.wait_for_gateway()
    new = federation.active()[organisation.silo_id]["adapter_digest"]
    after, kept = score(own, alice.ask_all(own)), score(rest, alice.ask_all(rest))
    story.table(
        "Before and after",
        ("", "before", "after"),
        [
            ("adapter", old[:16], new[:16]),
            (
                f"facts about {subject} that alice gets",
                f"{before.right} of {before.asked}",
                f"{after.right} of {after.asked}",
            ),
            ("the silo's other facts that alice gets", "", _of(kept)),
        ],
    )
    story.say(federation.audit_verifies())
    return receipt


def _of(score: Score) -> str:
    return f"{score.right} of {score.asked}"


def _show_one(story: Story, cast: Cast) -> None:
    question = cast.organisations[0].questions[0]
    allowed, denied = cast.analysts["alice"].ask(question.text), cast.analysts["carol"].ask(question.text)
    story.quote("question", question.text)
    story.quote("alice", allowed.text)
    shares = ", ".join(f"{silo} {100 * share:.0f}%" for silo, share in sorted(allowed.shares.items()))
    story.quote("shaped by", shares or "the base model alone")
    story.quote("carol", denied.text)
    story.say(f"carol may not use {question.silo_id}; for her it does not exist.")


def _closed(fetch: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any] | None]:
    ends = {"certified", "rejected", "duplicate", "withdrawn", "failed"}

    def check() -> dict[str, Any] | None:
        seen = fetch()
        return seen if seen["state"] in ends else None

    return check


def public_keys(federation: Federation, organisation: Organisation) -> list[str]:
    """The three public keys, as files, that are all it takes to check a receipt."""
    folder = federation.world.root / "public-keys"
    folder.mkdir(exist_ok=True)
    silo = next(row for row in federation.get("/v1/silos") if row["silo_id"] == organisation.silo_id)
    gateway = json.loads((federation.world.gateway / "gateway-key.json").read_text())
    keys = {
        "coordinator": federation.coordinator_key,
        "silo": silo["signing_keys"][-1],
        "gateway": gateway["signing_key"],
    }
    for name, key in keys.items():
        (folder / f"{name}.pub").write_text(key + "\n")
    return [word for name in keys for word in (f"--{name}-key", str(folder / f"{name}.pub"))]
