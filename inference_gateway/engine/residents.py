"""The adapters that may be used now and what is made of them: what a swap replaces while the worker is held."""

import threading
from collections.abc import Set
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from inference_gateway.engine.base import AdapterKey
from inference_gateway.engine.limits import EngineLimits
from inference_gateway.errors import EngineIncompatible
from seqr.library import Library, PermissionRows
from seqr.plan import Plan
from seqr.routed_linear import Site, join_sites
from seqr.routing.evidence import EvidenceState
from seqr.routing.features import feature_count
from seqr.routing.products import unsteady

if TYPE_CHECKING:  # needs Triton
    from inference_gateway.engine.kernel_routing import KernelRouting
    from seqr.kernels.tables import SiteTables

# Sets that users narrow by hand could fill the table without end; it is rebuilt from the running requests then.
MAX_ROWS = 1024


class Residents:
    """Read by both of the engine's halves. Between swaps only the worker's thread adds rows and writes evidence.

    ``retiring``: keys that no new request may use. ``membership``: held by whoever changes ``keys`` or ``retiring``, or
    lets a request in by them.
    """

    def __init__(self, model: Any, plan: Plan, slots: int, limits: EngineLimits):
        self.library = Library.empty(plan, model.device)
        self.rows = PermissionRows(self.library)
        self.keys: frozenset[AdapterKey] = frozenset()
        self.retiring: frozenset[AdapterKey] = frozenset()
        self.evidence = EvidenceState(len(plan.modules), slots, (), self.library.width, model.device)
        join_sites(model, plan)
        self.kernels = _kernels(model, plan, self.library, limits)
        if model.device.type == "cpu":
            _require_steady_products(model, plan, limits.deterministic)
        self.membership = threading.Lock()

    @property
    def usable(self) -> frozenset[AdapterKey]:
        """The keys that a new request may use."""
        return self.keys - self.retiring

    def tables_of(self, library: Library) -> "tuple[SiteTables, ...]":
        """What kernels will read of ``library``, for ``replace``."""
        return self.kernels.tables_of(library) if self.kernels is not None else ()

    def replace(
        self, library: Library, tables: "tuple[SiteTables, ...]", keys: Set[AdapterKey]
    ) -> frozenset[AdapterKey]:
        """Take another library, with ``membership``, while the worker is held; returns the keys that are gone."""
        before, self.keys = self.keys, frozenset(keys)
        self.retiring &= self.keys
        self.library = library
        if self.kernels is not None:
            self.kernels.tables = tables
        self.rows = PermissionRows(library)
        self.evidence.remap(library.columns, library.width)
        return before - self.keys

    def limit_rows(self) -> None:
        """Between two steps: drop a table of permission rows that has grown too long."""
        if self.rows.table.shape[0] > MAX_ROWS:
            self.rows = PermissionRows(self.library)


def _require_steady_products(model: Any, plan: Plan, deterministic: bool) -> None:
    """Raises ``EngineIncompatible`` where what is computed beside a token could change the token's bits."""
    sites = {site.a_t.shape: site.a_t for site in model.modules() if isinstance(site, Site)}
    dice = torch.Generator().manual_seed(0)  # the process's own stays where it is
    widths = sorted({module.out_features for module in plan.modules})
    shares = (torch.randn(plan.rank, outputs, generator=dice) for outputs in widths)
    if found := unsteady([*sites.values(), *shares], feature_count(plan.rank), deterministic):
        way = "set threads = 1" + (", and if that does not help deterministic = false" if deterministic else "")
        raise EngineIncompatible(
            f"on this processor, with {torch.get_num_threads()} threads, {found} has other bits alone than beside "
            f"others, so answers could depend on who else asks; {way}"
        )


def _kernels(model: Any, plan: Plan, library: Library, limits: EngineLimits) -> "KernelRouting | None":
    if limits.kernels is None:
        wanted = model.device.type == "cuda" and not limits.deterministic and find_spec("triton") is not None
    else:
        wanted = limits.kernels
    if not wanted:
        return None
    if limits.deterministic:
        raise EngineIncompatible("deterministic serving cannot route with kernels")
    from inference_gateway.engine.kernel_routing import KernelRouting

    return KernelRouting(model, plan, library)
