"""Called before torch's friends are imported: off the network, and silent about things the owner cannot act on."""

import os
import warnings


def quiet() -> None:
    """No model hub, no telemetry, and only errors from transformers and peft."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for category in (FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)
