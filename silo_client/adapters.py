"""The silo's adapter for a plan: taken from the cache while records and plan are unchanged, trained otherwise."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from seqr.adapter import Adapter
from seqr.canonical import canonical_json, sha256_hex
from seqr.files import write_private
from seqr.plan import Plan
from seqr.shared_a import verify_a
from silo_client.base import load_encoder, load_model, require_base_model
from silo_client.config import SiloConfig
from silo_client.corpus import Corpus, load_corpus, require_usable
from silo_client.dataset import Schedule
from silo_client.determinism import deterministic, environment, training_seed
from silo_client.erased import Tombstones
from silo_client.export import export
from silo_client.state import State, read_json, write_json
from silo_client.training import RECIPE, Progress, adapt, train

log = logging.getLogger("seqr.silo")

KEPT_ADAPTERS = 3


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter and what its manifest says about how it came to be. ``reused``: it was not trained just now."""

    adapter: Adapter
    plan_id: str
    dataset_root: str
    records: int
    tokens: int
    environment: dict[str, str]
    reused: bool


def current_corpus(config: SiloConfig, state: State, plan: Plan) -> Corpus:
    """The corpus as the files are now, with its problems still in it."""
    return load_corpus(config, load_encoder(config, plan), Tombstones(state), state.salt)


def obtain_adapter(
    config: SiloConfig,
    state: State,
    plan: Plan,
    *,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda sentence: None,
) -> TrainedAdapter:
    """The adapter of the current records under ``plan``. The caller holds the silo's lock.

    Raises:
        DataError, NoRecords: the records cannot be used.
        BaseModelMissing, BaseModelMismatch, ModuleMismatch, SharedAMismatch: this silo cannot train under the plan.
    """
    require_base_model(config, plan)
    corpus = current_corpus(config, state, plan)
    require_usable(corpus, skip_bad=config.skip_bad, tell=tell)
    store = _Store(state, plan, corpus)
    cached = store.load()
    if cached is not None:
        return cached
    trained = _train(config, plan, corpus, store, progress)
    store.save(trained)
    return trained


def last_adapter(state: State, plan_id: str) -> TrainedAdapter | None:
    """The adapter trained last under a plan, None where there is none."""
    found = [_read(path) for path in _newest_first(state.path / "adapters")]
    return next((one for one in found if one is not None and one.plan_id == plan_id), None)


def _train(
    config: SiloConfig, plan: Plan, corpus: Corpus, store: "_Store", progress: Progress | None
) -> TrainedAdapter:
    limits = plan.training
    schedule = Schedule(corpus.examples, plan.plan_id, limits.max_steps, limits.batch_size)
    with deterministic(config.threads):
        shared_a = verify_a(plan)
        model, pad_token = load_model(config, plan)
        adapted = adapt(model, plan, shared_a)
        factors = train(
            adapted,
            schedule,
            plan,
            seed=training_seed(plan.plan_id, config.silo_id),
            device=config.device,
            pad_token=pad_token,
            checkpoints=store.checkpoints,
            progress=progress,
        )
        adapter = export(adapted, plan, factors, schedule.used(), pad_token)
    return TrainedAdapter(
        adapter=adapter,
        plan_id=plan.plan_id,
        dataset_root=corpus.root,
        records=len(corpus.examples),
        tokens=corpus.tokens,
        environment=environment(config),
        reused=False,
    )


class _Store:
    """Where the adapter and the checkpoints of one plan and one set of records lie."""

    def __init__(self, state: State, plan: Plan, corpus: Corpus) -> None:
        name = sha256_hex(canonical_json([RECIPE, plan.plan_id, corpus.root]))[:32]
        self._root = corpus.root
        self._adapters = state.path / "adapters"
        self._meta = self._adapters / f"{name}.json"
        self._all_checkpoints = state.path / "checkpoints"
        self.checkpoints = self._all_checkpoints / name

    def load(self) -> TrainedAdapter | None:
        found = _read(self._meta)
        return found if found is not None and found.dataset_root == self._root else None

    def save(self, trained: TrainedAdapter) -> None:
        meta = {
            "plan_id": trained.plan_id,
            "dataset_root": trained.dataset_root,
            "records": trained.records,
            "tokens": trained.tokens,
            "environment": trained.environment,
            "adapter_digest": trained.adapter.digest,
        }
        write_private(self._meta.with_suffix(".safetensors"), trained.adapter.to_bytes())
        write_json(self._meta, meta)
        # The records have changed since any other unfinished training began, so it can never be resumed.
        for folder in self._all_checkpoints.iterdir():
            shutil.rmtree(folder)
        for old in _newest_first(self._adapters)[KEPT_ADAPTERS:]:
            old.with_suffix(".safetensors").unlink(missing_ok=True)
            old.unlink()


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _read(meta_path: Path) -> TrainedAdapter | None:
    meta = read_json(meta_path)
    tensors = meta_path.with_suffix(".safetensors")
    if meta is None or not tensors.is_file():
        return None
    adapter = Adapter.from_bytes(tensors.read_bytes())
    if adapter.digest != meta["adapter_digest"]:
        log.warning("a cached adapter does not have the digest it was stored with, and is not used")
        return None
    return TrainedAdapter(
        adapter, meta["plan_id"], meta["dataset_root"], meta["records"], meta["tokens"], meta["environment"], True
    )
