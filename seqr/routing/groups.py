"""Tokens grouped by the adapter they chose, so that each adapter in use is one product."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Groups:
    """tokens int64 [K]: the tokens that have an adapter, sorted by its column; runs: (column, start, end) into tokens.

    everything: all T tokens chose one and the same adapter, so that nothing need be gathered.
    """

    tokens: torch.Tensor
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
        for column, tokens in sorted(members.items()):
            runs.append((column, len(order), len(order) + len(tokens)))
            order += tokens
        everything = len(runs) == 1 and len(order) == len(columns)
        return cls(torch.tensor(order, dtype=torch.int64, device=device), tuple(runs), everything)
