"""One real federation on loopback with a tiny model: every process is the product's own."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.demo.federation import Federation, PlanChoice
from coordinator.demo.organisations import load_organisations
from coordinator.demo.world import World
from tests.e2e.recorded import Recorded, with_canary
from tests.e2e.recording_proxy import RecordingProxy

TRAIN_TIMEOUT_S = 180.0


@pytest.fixture(scope="package")
def tiny_base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from seqr.models import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="package")
def recorded(tiny_base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """Two silos, trained, admitted and served; the first one's bytes are recorded in clear."""
    world = World(tmp_path_factory.mktemp("federation"))
    federation = Federation(
        world,
        tiny_base_model,
        PlanChoice(rank=4, alpha=8.0, max_steps=40, batch_size=4, dtype="float32", max_length=256),
    )
    first, second, _ = load_organisations()
    organisations = (with_canary(first), replace(second, records=second.records[:24]))
    proxies: tuple[RecordingProxy, ...] = ()
    try:
        federation.initialise()
        federation.start_services()
        federation.wait_for_gateway()
        certificates = world.coordinator / "certs"
        files = (certificates / "server.crt", certificates / "server.key", certificates / "ca.crt")
        proxies = (RecordingProxy(world.coordinator_port, *files), RecordingProxy(world.superlink_port, *files))
        for organisation, through in zip(organisations, (proxies, None), strict=True):
            silo_id = organisation.silo_id
            if through:
                rest, fleet = (f"127.0.0.1:{proxy.port}" for proxy in through)
                fingerprint = federation.enrol(organisation, superlink=fleet, coordinator_url=f"https://{rest}")
            else:
                fingerprint = federation.enrol(organisation)
            federation.approve(silo_id, fingerprint)
            federation.start_silo(silo_id)
            federation.train(silo_id)
        federation.wait_active([organisation.silo_id for organisation in organisations], TRAIN_TIMEOUT_S)
        yield Recorded(federation, organisations, proxies)
    finally:
        for proxy in proxies:
            proxy.close()
        world.stop()
