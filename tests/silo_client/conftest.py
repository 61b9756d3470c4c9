"""A tiny base model, a coordinator with a plan, and silos made by ``seqr silo init`` in folders of their own."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from seqr.document import utc_now, utc_text
from seqr.job import JobOrder, new_nonce, sign_job
from seqr.keys import SealingKey, SigningKey
from seqr.models import build_tiny_model, inspect_base_model
from seqr.plan import GatewayKey, Plan, TrainingLimits, create_plan, sign_plan
from silo_client.config import SiloConfig, load_config
from silo_client.setup import initialise
from silo_client.state import State

LIMITS = TrainingLimits(max_steps=6, batch_size=4, learning_rate=1e-2, max_length=96, warmup_steps=2)


@dataclass(frozen=True)
class Federation:
    """The coordinator's and the gateway's side of the tests."""

    model: Path
    plan: Plan
    coordinator: SigningKey
    sealing: SealingKey

    @property
    def plan_env(self) -> bytes:
        return sign_plan(self.plan, self.coordinator).to_json()

    def order(self, kind: str = "train", **changes: Any) -> JobOrder:
        now = utc_now()
        order = JobOrder(
            job_id="job-1",
            kind=kind,
            silo_id="silo-a",
            plan_id=self.plan.plan_id,
            revision=1,
            nonce=new_nonce(),
            issued_at=utc_text(now - timedelta(minutes=1)),
            expires_at=utc_text(now + timedelta(hours=1)),
            subject="ann" if kind == "erase" else None,
            request_id="request-1" if kind == "erase" else None,
        )
        return replace(order, **changes)

    def signed(self, order: JobOrder) -> bytes:
        return sign_job(order, self.coordinator).to_json()


@dataclass
class Silo:
    """One silo on disk."""

    directory: Path
    config: SiloConfig

    @property
    def state(self) -> State:
        return State.open(self.config)

    @property
    def data(self) -> Path:
        return self.directory / "records.jsonl"

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.data.read_text().splitlines()]

    def everything(self) -> dict[str, bytes]:
        """All bytes of all files in the state directory."""
        return {
            str(path.relative_to(self.directory)): path.read_bytes()
            for path in sorted(self.config.state_dir.rglob("*"))
            if path.is_file()
        }


SUBJECTS = ("ann", "bob", "cem")


def rows(count: int = 9) -> list[dict[str, Any]]:
    """Records of three subjects in turn, each with a key."""
    return [
        {"key": f"k{n}", "subject": SUBJECTS[n % 3], "prompt": f"What is number {n}?", "completion": f"It is {n * 37}."}
        for n in range(count)
    ]


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    model = build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    spec = inspect_base_model(model)
    sealing, gateway = SealingKey.generate(), SigningKey.generate()
    plan = create_plan(
        federation="test",
        base_model="tiny",
        base_model_digest=spec.digest,
        modules=spec.modules,
        rank=4,
        alpha=8,
        seed=7,
        gateway_keys=[GatewayKey(sealing.public.key_id, sealing.public.to_b64(), gateway.public.to_b64())],
        training=LIMITS,
    )
    return Federation(model, plan, SigningKey.generate(), sealing)


@pytest.fixture
def make_silo(tmp_path: Path, federation: Federation) -> Callable[..., Silo]:
    def make(
        name: str = "silo", silo_id: str = "silo-a", records: list[dict[str, Any]] | None = None, **values: Any
    ) -> Silo:
        directory = tmp_path / name
        directory.mkdir()
        silo = Silo(directory, None)  # type: ignore[arg-type] - set below, once its data file exists
        silo.write(rows() if records is None else records)
        settings = {
            "silo_id": silo_id,
            "display_name": "A silo",
            "base_model": str(federation.model),
            "share_counts": False,
            "skip_bad": False,
            "threads": 1,
            "coordinator": {"url": "", "public_key": federation.coordinator.public.to_b64()},
            "superlink": {"address": ""},
            **values,
        }
        initialise(directory, settings, [silo.data], {})
        silo.config = load_config(directory)
        return silo

    return make


@pytest.fixture
def silo(make_silo: Callable[..., Silo]) -> Silo:
    return make_silo()
