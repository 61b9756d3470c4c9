"""Which node keys are let in, with the SuperLink's answers played by the test."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from coordinator.errors import LauncherRunning
from coordinator.flower import FlowerLauncher
from coordinator.flower_nodes import FlowerNodes
from coordinator.settings import make_settings


def _node_key() -> str:
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


class PlayedSuperLink:
    """Lets something happen elsewhere while it lists its nodes."""

    def __init__(self, registered: dict[str, Any], meanwhile: Any) -> None:
        self.registered = registered
        self.removed: list[str] = []
        self._meanwhile = meanwhile

    def __enter__(self) -> "PlayedSuperLink":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def nodes_by_key(self) -> dict[str, Any]:
        self._meanwhile()
        return dict(self.registered)

    def add(self, silo_id: str, key: str, known: Any) -> None:
        self.registered.setdefault(key, SimpleNamespace(name=silo_id, status="registered"))

    def remove(self, node: Any) -> None:
        self.removed.append(node.name)


def _nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, superlink: PlayedSuperLink) -> FlowerNodes:
    nodes = FlowerNodes(make_settings(directory=tmp_path))
    monkeypatch.setattr(nodes, "_control", lambda: superlink)
    return nodes


def test_a_silo_approved_while_the_keys_are_compared_is_not_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    approved: dict[str, str] = {}
    registered: dict[str, Any] = {}
    key = _node_key()

    def the_admin_approves() -> None:
        approved[key] = "clinic"
        registered[key] = SimpleNamespace(name="clinic", status="registered")

    superlink = PlayedSuperLink(registered, the_admin_approves)
    assert _nodes(tmp_path, monkeypatch, superlink).sync(lambda: dict(approved)) == []
    assert superlink.removed == []


def test_a_node_that_no_silo_stands_behind_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = SimpleNamespace(name="stranger", status="registered")
    superlink = PlayedSuperLink({_node_key(): stranger}, lambda: None)
    mine = _node_key()
    assert _nodes(tmp_path, monkeypatch, superlink).sync(lambda: {mine: "clinic"}) == []
    assert superlink.removed == ["stranger"]
    assert mine in superlink.registered


def test_a_second_launcher_in_one_directory_is_refused_by_name(tmp_path: Path) -> None:
    settings = make_settings(directory=tmp_path, superlink_address="127.0.0.1:1", superlink_ca_file=tmp_path / "ca.crt")
    first, second = FlowerLauncher(settings, dict), FlowerLauncher(settings, dict)
    first.start()
    with pytest.raises(LauncherRunning, match="another `seqr coordinator flower` runs in"):
        second.start()
