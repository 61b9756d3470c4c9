"""A federation under test, and what its first silo sent."""

from dataclasses import dataclass, replace

from coordinator.demo.federation import Federation
from coordinator.demo.organisations import Organisation
from coordinator.demo.world import World
from tests.e2e.recording_proxy import RecordingProxy

CANARY = "zqx-canary-7f3e91"


@dataclass
class Recorded:
    """A running federation whose first silo talks through recording proxies."""

    federation: Federation
    organisations: tuple[Organisation, ...]
    proxies: tuple[RecordingProxy, ...]

    @property
    def world(self) -> World:
        return self.federation.world

    @property
    def sent(self) -> bytes:
        return b"".join(bytes(proxy.sent) for proxy in self.proxies)


def with_canary(organisation: Organisation) -> Organisation:
    """The organisation with the canary in every prompt, completion, subject and key."""
    records = tuple(
        {name: f"{value} {CANARY}" if name != "key" else f"{value}-{CANARY}" for name, value in record.items()}
        for record in organisation.records[:24]
    )
    return replace(organisation, records=records)
