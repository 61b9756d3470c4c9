"""Settings every test shares: no network, no telemetry, small thread counts."""

import os
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Tests share the cores with one another: torch with several threads each would wait most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads this when it is first imported, which transformers does; only seqr/kernels has kernels. Set it to 0 to
# test them on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")


class ByFile(LoadScopeScheduling):
    """A worker takes a whole file, so that a file's servers start once.

    e2e shares one federation, and no two browsers run at a time.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return next((shared for shared in ("tests/e2e", "playground") if shared in file), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)
