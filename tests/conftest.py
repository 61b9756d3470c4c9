"""Settings every test shares: no network, no telemetry, small thread counts."""

import os

import pytest

# Tests share the cores with one another: torch with several threads each would wait most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads this when it is first imported, which transformers does; only seqr/kernels has kernels. Set it to 0 to
# test them on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers take the suite file by file, so that a file's servers start once; e2e shares one federation."""
    for item in items:
        folder, file = item.path.parent.name, item.path.name
        item.add_marker(pytest.mark.xdist_group("e2e" if folder == "e2e" else f"{folder}/{file}"))
