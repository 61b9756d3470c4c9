"""Tokens grouped by the adapter they chose, so that each adapter in use is one product."""

from dataclasses import dataclass

import torch

from seqr.routing.products import ROW_TILE


@dataclass(frozen=True)
class Groups:
    """The K tokens that have an adapter, sorted by its column, each column's run filled up to a multiple of 16 rows.

    tokens int64 [K]: the tokens; rows int64 [K']: the token in each row, where a run's last token fills its rest; kept
    int64 [K]: the row of each token; runs: (column, start, end) into the rows. everything: all T tokens chose one and
    the same adapter, so that nothing need be gathered.
    """

    tokens: torch.Tensor
    rows: torch.Tensor
    kept: torch.Tensor
    runs: tuple[tuple[int, int, int], ...]
    everything: bool

    @classmethod
    def of(cls, columns: list[int], device: torch.device) -> "Groups":
        """Group the choices of T tokens; -1 is nobody, and in no group."""
        members: dict[int, list[int]] = {}
        for token, column in enumerate(columns):
            members.setdefault(column, []).append(token)
        members.pop(-1, None)
        runs: list[tuple[int, int, int]] = []
        order: list[int] = []
        rows: list[int] = []
        kept: list[int] = []
        for column, tokens in sorted(members.items()):
            start = len(rows)
            kept += range(start, start + len(tokens))
            order += tokens
            rows += tokens + tokens[-1:] * (-len(tokens) % ROW_TILE)
            runs.append((column, start, len(rows)))
        everything = len(runs) == 1 and len(order) == len(columns)

        def index(numbers: list[int]) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=device)

        return cls(index(order), index(rows), index(kept), tuple(runs), everything)
