"""A pytest plugin: what the engines' conformance suite needs of its parent's conftest, which imports a whole gateway.

python -m pytest -p benchmarks.gpu.gateway_fixtures --confcutdir=tests/inference_gateway/conformance ...
"""

import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Some packages install a top-level "tests", which would hide this repository's.
sys.modules["tests"] = ModuleType("tests")
sys.modules["tests"].__path__ = [str(ROOT / "tests")]

from seqr.keys import SealingKey, SigningKey  # noqa: E402
from seqr.models import build_tiny_model  # noqa: E402
from seqr.plan import Plan  # noqa: E402
from tests.inference_gateway.support import Gateway, make_plan  # noqa: E402


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def plan(model_dir: Path) -> Plan:
    """Over its attention: two kinds of sites to compile kernels for."""
    return make_plan(model_dir, Gateway(SealingKey.generate(), SigningKey.generate()), "attention")
