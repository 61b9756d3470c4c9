"""``seqr demo``: the whole product on one machine with one command."""

import json
import os
import shlex
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seqr.files import write_private

if TYPE_CHECKING:
    from coordinator.demo.federation import Federation
    from coordinator.demo.story import Story

app = typer.Typer(add_completion=False)

CORPUS_QUESTIONS = 20


@app.callback(invoke_without_command=True)
def demo(
    data: Annotated[
        Path | None, typer.Option(help="One folder per silo with train.jsonl and test.jsonl, instead of invented ones.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model: hub id, directory or GGUF file; default SmolLM2-135M-Instruct.")
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A random model that needs no download: shows the way, learns nothing.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps; default by the number of records of the largest silo.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the services running at the end, until Ctrl-C.")] = False,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Where to keep everything; default a temporary folder."),
    ] = None,
) -> None:
    """Train silos, ask through the gateway, revoke a grant, delete a person's records and show the receipt."""
    from coordinator.demo import chapters
    from coordinator.demo.corpus import load_corpus
    from coordinator.demo.federation import Federation
    from coordinator.demo.models import choose_model, choose_plan
    from coordinator.demo.organisations import load_organisations
    from coordinator.demo.story import Story
    from coordinator.demo.world import World

    organisations = load_corpus(data, CORPUS_QUESTIONS) if data else load_organisations()
    root = directory or Path(tempfile.mkdtemp(prefix="seqr-demo-"))
    # Libraries' own bars would run through the story.
    os.environ.setdefault("TQDM_DISABLE", "1")
    if model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    story, world = Story(), World(root.absolute())
    cast = chapters.Cast(organisations)
    try:
        folder = choose_model(model, tiny, world.root)
        federation = Federation(world, folder, choose_plan(organisations, tiny, steps))
        chapters.found(story, federation)
        chapters.train(story, federation, cast)
        chapters.grant(story, federation, cast)
        chapters.ask(story, cast)
        chapters.revoke(story, federation, cast)
        chapters.delete(story, federation, cast)
        story.say(f"\nThe whole story took {story.elapsed:.0f} s.")
        if keep:
            _keep(story, federation, cast.questions[-1].text)
    finally:
        # An impatient second Ctrl-C must not leave services behind.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        world.stop()
        if directory is None:
            shutil.rmtree(root, ignore_errors=True)


def _keep(story: "Story", federation: "Federation", question: str) -> None:
    key = federation.new_key("alice", "chat")
    url = federation.world.gateway_url
    story.chapter("The services keep running until Ctrl-C")
    key_file = federation.world.root / "admin.key"
    write_private(key_file, federation.admin_key.encode())
    folder = federation.world.coordinator
    story.say("An analyst: log in to the playground with this key, or ask from a shell.")
    story.verbatim(f"{url}/\n{key}")
    request = {
        "model": federation.model.name,
        "messages": [{"role": "user", "content": question}],
        "seqr": {"attribution": True},
    }
    story.verbatim(
        f"curl {url}/v1/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(request))}"
    )
    story.say("An admin, who is privacy officer here, too: seqr coordinator silos, … deletion list; seqr policy …")
    story.verbatim(
        f"export SEQR_COORDINATOR_URL={federation.world.coordinator_url} SEQR_COORDINATOR_KEY_FILE={key_file} "
        f"SEQR_COORDINATOR_CA_FILE={federation.ca_file}"
    )
    story.verbatim(
        f"export SEQR_POLICY_DATABASE_URL=sqlite:///{folder / 'policy.db'} "
        f"SEQR_POLICY_PEPPER_FILE={folder / 'policy.pepper'} SEQR_POLICY_ACTOR=ada"
    )
    try:
        while True:
            time.sleep(1.0)
    except KeyboardInterrupt:
        story.say("Stopping.")
