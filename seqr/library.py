"""The library: the adapters resident in a gateway, stacked per module. Immutable: a change makes a new one."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from seqr.adapter import Adapter, ModuleAdapter
from seqr.errors import SeqrError
from seqr.plan import ModuleSpec, Plan
from seqr.routing.exact import Truth, bounds
from seqr.routing.features import feature_count, gram
from seqr.routing.per_token import Columns, Together
from seqr.routing.products import COLUMN_BLOCK, column_blocks

Statistics = Mapping[str, tuple[float, float]]


class SiloAlreadyPresent(SeqrError):
    """An adapter was added for a silo that has one."""

    code = "silo_already_present"


class SiloNotPresent(SeqrError):
    """A silo without an adapter here was to lose or change it."""

    code = "silo_not_present"


class AdapterMismatch(SeqrError):
    """An adapter whose modules or shapes are not the plan's."""

    code = "adapter_mismatch"


class CalibrationMissing(SeqrError):
    """The plan routes by public calibration, and an adapter came without it."""

    code = "calibration_missing"


@dataclass(frozen=True)
class ModuleColumn:
    """One adapter in one module: gram fp32 [F], vech(R^T R) / sigma^2; offset mu / sigma; b_t [r, m] fp32, (Q R)^T.

    r fp32 [r, r], mu and sigma are what gram and offset are rounded from.
    """

    gram: torch.Tensor
    offset: float
    b_t: torch.Tensor
    r: torch.Tensor
    mu: float
    sigma: float

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """c and a of ``seqr.routing.exact``, once per adapter: a library is made anew at every swap."""
        with torch.inference_mode(False):
            slope, floor = bounds(self.r[None], torch.tensor([self.sigma], dtype=torch.float64))
            return float(slope), float(floor)


@dataclass(frozen=True)
class Column:
    """One silo's revision, in the order of the plan's modules."""

    silo_id: str
    revision: int
    modules: tuple[ModuleColumn, ...]


@dataclass(frozen=True)
class ModuleStack(Columns):
    """One module's adapters side by side; columns from ``len(b_t)`` on are padding and never permitted.

    gram [N / 64, F, 64] fp32 and offset [N] fp32, as ``seqr.routing.scores.scores`` takes them; b_t: each adapter's
    (s B)^T = (Q R)^T [r, m] fp32; truth: R, mu and sigma for the choices that fp32 cannot make. The offset of an
    adapter that cannot be used in this module is NaN.
    """

    b_t: tuple[torch.Tensor, ...]
    truth: Truth

    @cached_property
    def addresses(self) -> npt.NDArray[np.int64]:
        """Where each adapter's b_t lies in memory, int64 [N], for as long as this stack holds it."""
        return np.array([part.data_ptr() for part in self.b_t], dtype=np.int64)


class Library:
    """Adapters in columns, sorted by the bytes of the silo id; N is their number rounded up to a multiple of 64.

    ``add``, ``replace`` and ``remove`` return a new library whose version is one higher and share every adapter's
    tensors with this one, so whoever still holds this one keeps a consistent view.
    """

    def __init__(
        self, plan: Plan, columns: Iterable[Column] = (), version: int = 0, device: torch.device | str = "cpu"
    ):
        self.plan = plan
        self.version = version
        self.device = torch.device(device)
        self._columns = tuple(sorted(columns, key=lambda column: column.silo_id.encode()))
        self.silos = tuple(column.silo_id for column in self._columns)
        self.columns = tuple((column.silo_id, column.revision) for column in self._columns)
        self.width = COLUMN_BLOCK * max(1, -(-len(self._columns) // COLUMN_BLOCK))
        with torch.inference_mode(False):
            self.stacks = tuple(self._stack(index) for index in range(len(plan.modules)))
            # bool [N]: the columns that are finite in every module, so that they may shape a whole sequence.
            self.finite = torch.stack([~stack.offset.isnan() for stack in self.stacks]).all(0)
        self._index = {spec.name: index for index, spec in enumerate(plan.modules)}
        self._together: dict[tuple[int, int, bool], Together] = {}

    @classmethod
    def empty(cls, plan: Plan, device: torch.device | str = "cpu") -> "Library":
        """A library of no adapters for ``plan``."""
        return cls(plan, device=device)

    def add(self, silo_id: str, revision: int, adapter: Adapter, stats: Statistics | None = None) -> "Library":
        """With one silo's adapter more. ``stats``: (mu, sigma) per module from public calibration.

        Raises ``SiloAlreadyPresent``, ``AdapterMismatch``, ``CalibrationMissing``. An adapter that is not finite in a
        module (Q, R, mu or sigma, or sigma <= 0) is admitted and never chosen in that module: refusing it is intake's.
        """
        if silo_id in self.silos:
            raise SiloAlreadyPresent(f"silo {silo_id} already has an adapter here: replace it instead")
        return self._with([*self._columns, self._column(silo_id, revision, adapter, stats)])

    def replace(self, silo_id: str, revision: int, adapter: Adapter, stats: Statistics | None = None) -> "Library":
        """With another revision of a silo's adapter; raises ``SiloNotPresent`` and as ``add`` does."""
        self._require(silo_id)
        others = [column for column in self._columns if column.silo_id != silo_id]
        return self._with([*others, self._column(silo_id, revision, adapter, stats)])

    def remove(self, silo_id: str) -> "Library":
        """Without a silo's adapter; raises ``SiloNotPresent``. Its tensors are freed with the last library and step."""
        self._require(silo_id)
        return self._with([column for column in self._columns if column.silo_id != silo_id])

    def together(self, first: int, count: int, exact: bool) -> Together:
        """The stacks of ``count`` modules from ``first`` on, to be routed in one call; the same object every time."""
        key = first, count, exact
        if key not in self._together:
            stacks = self.stacks[first : first + count]
            self._together[key] = Together(stacks, tuple(stack.truth for stack in stacks) if exact else ())
        return self._together[key]

    def permission_row(self, silos: Iterable[str]) -> torch.Tensor:
        """bool [N] on the CPU: True for the silos named and present; a silo that is not present is simply not there."""
        named = frozenset(silos)
        row = torch.zeros(self.width, dtype=torch.bool)
        row[: len(self.silos)] = torch.tensor([silo_id in named for silo_id in self.silos], dtype=torch.bool)
        return row

    def _require(self, silo_id: str) -> None:
        if silo_id not in self.silos:
            raise SiloNotPresent(f"silo {silo_id} has no adapter here")

    def _with(self, columns: Iterable[Column]) -> "Library":
        return Library(self.plan, columns, self.version + 1, self.device)

    def _column(self, silo_id: str, revision: int, adapter: Adapter, stats: Statistics | None) -> Column:
        if set(adapter.modules) != set(self._index):
            odd = sorted(set(adapter.modules) ^ set(self._index))
            raise AdapterMismatch(f"the adapter of silo {silo_id} must have the plan's modules; it differs in {odd[0]}")
        own = self.plan.calibration == "own"
        if not own and (stats is None or any(name not in stats for name in self._index)):
            raise CalibrationMissing(
                f"plan {self.plan.plan_id} routes by public calibration: recalibrate silo {silo_id} on the public text"
            )
        modules = []
        for spec in self.plan.modules:
            part = adapter.modules[spec.name]
            self._check_shapes(silo_id, spec, part)
            mu, sigma = (part.mu, part.sigma) if own or stats is None else stats[spec.name]
            modules.append(_module_column(part, float(mu), float(sigma), self.device))
        return Column(silo_id, revision, tuple(modules))

    def _check_shapes(self, silo_id: str, spec: ModuleSpec, part: ModuleAdapter) -> None:
        rank = self.plan.rank
        expected, got = ((spec.out_features, rank), (rank, rank)), (tuple(part.q.shape), tuple(part.r.shape))
        if got != expected:
            raise AdapterMismatch(
                f"the adapter of silo {silo_id} has Q, R of shapes {got} in {spec.name}; the plan wants {expected}"
            )

    def _stack(self, index: int) -> ModuleStack:
        parts = [column.modules[index] for column in self._columns]
        rank, padding = self.plan.rank, self.width - len(parts)
        grams = torch.stack([*(part.gram for part in parts), *[torch.zeros(feature_count(rank))] * padding])
        r = torch.stack([*(part.r for part in parts), *[torch.zeros(rank, rank)] * padding])
        offset = torch.tensor([*(part.offset for part in parts), *[0.0] * padding])
        numbers = [*((part.mu, part.sigma, *part.bounds) for part in parts), *[(0.0, 0.0, 0.0, 0.0)] * padding]
        mu, sigma, slope, floor = (torch.tensor(c, dtype=torch.float64) for c in zip(*numbers, strict=True))
        usable = (sigma > 0.0) & ~offset.isnan()
        r, mu, sigma, usable, slope, floor = (t.to(self.device) for t in (r, mu, sigma, usable, slope, floor))
        truth = Truth.of(r, mu, sigma, usable, (slope, floor))
        return ModuleStack(
            column_blocks(grams).to(self.device), offset.to(self.device), tuple(part.b_t for part in parts), truth
        )


def _module_column(part: ModuleAdapter, mu: float, sigma: float, device: torch.device) -> ModuleColumn:
    with torch.inference_mode(False):
        q, r = (t.detach().to("cpu", torch.float64) for t in (part.q, part.r))
        b_t = (q @ r).T.to(torch.float32).contiguous()
        grams, offset = gram(r).to(torch.float32), math.nan
        if math.isfinite(mu) and math.isfinite(sigma) and sigma > 0.0:
            grams, offset = (gram(r) / sigma / sigma).to(torch.float32), mu / sigma
        if not (math.isfinite(offset) and bool(torch.isfinite(b_t).all()) and bool(torch.isfinite(grams).all())):
            return ModuleColumn(
                torch.zeros_like(grams), math.nan, torch.zeros_like(b_t).to(device), torch.zeros_like(r), 0.0, 1.0
            )
        return ModuleColumn(grams, offset, b_t.to(device), r.to(torch.float32), mu, sigma)


class PermissionRows:
    """The device table of permitted sets: one row per distinct set, row 0 permits nobody."""

    def __init__(self, library: Library):
        self.library = library
        self._sets: list[frozenset[str]] = [frozenset()]
        self._rows = {frozenset[str](): 0}
        self._table = self._built(self._sets)

    def __len__(self) -> int:
        return len(self._sets)

    @property
    def table(self) -> torch.Tensor:
        """bool [P, N] on the library's device."""
        if new := self._sets[self._table.shape[0] :]:
            with torch.inference_mode(False):
                self._table = torch.cat([self._table, self._built(new)])
        return self._table

    def row_for(self, silos: Iterable[str]) -> int:
        """The row of a permitted set; equal sets share one. The empty set is row 0."""
        wanted = frozenset(silos)
        if wanted not in self._rows:
            self._rows[wanted] = len(self._sets)
            self._sets.append(wanted)
        return self._rows[wanted]

    def _built(self, sets: Iterable[frozenset[str]]) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.stack([self.library.permission_row(silos) for silos in sets]).to(self.library.device)
