"""Checkpoints that can be trusted after ``kill -9``: each is sealed with the digests of its files once it is whole."""

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from seqr.canonical import sha256_hex
from silo_client.errors import StateDamaged
from silo_client.state import read_json, write_json

SEAL = "complete.json"


class SealCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Seals every checkpoint that the Trainer has finished writing."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        write_json(folder / SEAL, _digests(folder))
        return control


def latest_whole(directory: Path) -> Path | None:
    """The newest checkpoint in ``directory`` whose every file is as it was sealed; all others after it are deleted."""
    found = sorted(directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step, reverse=True)
    for folder in found:
        if _is_whole(folder):
            return folder
        shutil.rmtree(folder)
    return None


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _is_whole(folder: Path) -> bool:
    try:
        sealed = read_json(folder / SEAL)
    except StateDamaged:
        return False
    return sealed is not None and sealed == _digests(folder)


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.name: sha256_hex(path.read_bytes())
        for path in sorted(folder.iterdir())
        if path.name != SEAL and path.is_file()
    }
