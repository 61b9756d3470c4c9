"""The running requests as the engine's thread sees them."""

from typing import Any

from inference_gateway.engine.base import AdapterKey, GenerationRequest
from inference_gateway.engine.sequences import Running, SequenceTable

COMPARED: list[str] = []


class CountedKey(AdapterKey):
    """Notes when it is compared with a key that is another object."""

    def __eq__(self, other: object) -> bool:
        COMPARED.append(self.silo_id)
        return super().__eq__(other)

    __hash__ = AdapterKey.__hash__


def keys(kind: type[AdapterKey], *silos: str) -> frozenset[AdapterKey]:
    return frozenset(kind(silo, 1, "digest") for silo in silos)


def sequence(adapters: frozenset[AdapterKey]) -> Running:
    def deliver(_: Any) -> None:
        raise AssertionError("nothing is delivered here")

    return Running(GenerationRequest("r", (1, 2), 4, adapters, "evidence"), deliver, None)


def test_a_set_of_resident_adapters_is_compared_with_a_request_once() -> None:
    one, resident = sequence(keys(CountedKey, "clinic", "plant")), keys(CountedKey, "clinic", "law", "plant")
    COMPARED.clear()
    assert all(one.within(resident) for _ in range(5))
    assert sorted(COMPARED) == ["clinic", "plant"]


def test_every_new_set_of_resident_adapters_is_compared() -> None:
    one = sequence(keys(AdapterKey, "clinic", "plant"))
    assert one.within(keys(AdapterKey, "clinic", "plant"))
    assert not one.within(keys(AdapterKey, "clinic"))
    assert not one.within(keys(AdapterKey, "clinic"))
    assert one.within(keys(AdapterKey, "law", "clinic", "plant"))


def test_a_request_that_has_ended_takes_no_slot() -> None:
    """It may end after the worker has looked it up: nobody would give its slot back."""
    table, one = SequenceTable(1), sequence(frozenset())
    table.add(one)
    looked_up = table.get("r")
    table.end("r", None)
    assert looked_up is one and table.slot_of(one) is None and table.reclaim() == []
    another = sequence(frozenset())
    table.add(another)
    assert table.slot_of(another) == 0
