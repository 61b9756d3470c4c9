"""A federation in miniature: keys, a tiny base model, a plan for it, and adapters of that plan."""

import hashlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from seqr import routed_linear
from seqr.adapter import Adapter, ModuleAdapter
from seqr.factorize import factorize
from seqr.keys import SealingKey, SigningKey
from seqr.models import build_tiny_model, inspect_base_model
from seqr.plan import GatewayKey, ModuleSpec, Plan, create_plan
from seqr.routing import evidence, per_token, search

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@pytest.fixture(scope="module", params=["compiled", "torch"])
def either_way(request: pytest.FixtureRequest) -> Iterator[str]:
    """On a CPU: with the compiled passes, and as without Numba."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            for module in (per_token, evidence, routed_linear, search):
                patch.setattr(module, "compiled", None)
        yield request.param


def signing_key(name: str) -> SigningKey:
    """A fixed key for tests, so that digests and ids can be written down."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return SigningKey(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()))


def sealing_key(name: str) -> SealingKey:
    from cryptography.hazmat.primitives.asymmetric import mlkem, x25519

    seed = hashlib.sha512(name.encode()).digest()
    curve = x25519.X25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())
    return SealingKey(mlkem.MLKEM768PrivateKey.from_seed_bytes(seed), curve)


@pytest.fixture(scope="session")
def now() -> datetime:
    return NOW


@pytest.fixture(scope="session")
def coordinator_key() -> SigningKey:
    return signing_key("coordinator")


@pytest.fixture(scope="session")
def silo_key() -> SigningKey:
    return signing_key("silo")


@pytest.fixture(scope="session")
def stranger_key() -> SigningKey:
    return signing_key("stranger")


@pytest.fixture(scope="session")
def gateway_signing_key() -> SigningKey:
    return signing_key("gateway")


@pytest.fixture(scope="session")
def gateway_sealing_key() -> SealingKey:
    return sealing_key("gateway")


@pytest.fixture(scope="session")
def other_sealing_key() -> SealingKey:
    return sealing_key("another gateway")


@pytest.fixture(scope="session")
def gateway_key(gateway_sealing_key: SealingKey, gateway_signing_key: SigningKey) -> GatewayKey:
    return GatewayKey.of(gateway_sealing_key.public, gateway_signing_key.public)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model on disk. Tests must not change it."""
    return build_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tiny_plan(tiny_model_dir: Path, gateway_key: GatewayKey) -> Plan:
    """A plan over all Linears of the tiny model, rank 4."""
    base = inspect_base_model(tiny_model_dir, "all")
    return create_plan(
        federation="test",
        base_model=base.name,
        base_model_digest=base.digest,
        modules=base.modules,
        rank=4,
        alpha=8.0,
        seed=7,
        gateway_keys=[gateway_key],
        created_at=NOW,
    )


@pytest.fixture(scope="session")
def small_plan(gateway_key: GatewayKey) -> Plan:
    """A plan of two modules that belongs to no real model: enough for everything that only handles bytes."""
    return create_plan(
        federation="test",
        base_model="none",
        base_model_digest="sha256:" + "ab" * 32,
        modules=[ModuleSpec("layers.0.q", 12, 16), ModuleSpec("layers.0.v", 12, 8)],
        rank=3,
        alpha=6.0,
        seed=11,
        gateway_keys=[gateway_key],
        created_at=NOW,
    )


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Adapter]:
    """``make_adapter(plan, seed=0)``: a random adapter that is well-formed for ``plan``."""

    def make(plan: Plan, seed: int = 0) -> Adapter:
        random = np.random.default_rng(seed)
        modules = {}
        for module in plan.modules:
            b = torch.from_numpy(random.standard_normal((module.out_features, plan.rank)) * 0.05).float()
            q, r = factorize(b, plan.scale)
            mu = float(torch.linalg.matrix_norm(r)) / plan.rank**0.5
            modules[module.name] = ModuleAdapter(q, r, mu, mu / 3)
        return Adapter(modules)

    return make
