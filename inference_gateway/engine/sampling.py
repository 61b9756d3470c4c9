"""Drawing the next token, one request at a time: a request's draws depend on its own logits and seed only."""

import torch

from inference_gateway.engine.base import Sampling


class Draw:
    """The random draws of one request; a request at temperature 0 has none."""

    def __init__(self, sampling: Sampling):
        self._sampling = sampling
        self._generator = torch.Generator(device="cpu")
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def token(self, logits: torch.Tensor) -> int:
        """A token drawn from logits [V] fp32: temperature, then the smallest set of tokens of mass >= top_p."""
        scaled = logits.detach().to("cpu", torch.float64) / self._sampling.temperature
        probabilities = torch.softmax(scaled, dim=0)
        order = None
        if self._sampling.top_p < 1.0:
            probabilities, order = probabilities.sort(descending=True, stable=True)
            before = probabilities.cumsum(0) - probabilities
            probabilities = probabilities.masked_fill((before >= self._sampling.top_p) & (before > 0), 0.0)
        mass = probabilities.cumsum(0)
        reach = torch.rand((), generator=self._generator, dtype=torch.float64) * mass[-1]
        # The first place where the mass passes `reach`; rounding may leave none, and then the last of any mass.
        index = min(int(torch.searchsorted(mass, reach, right=True)), int(probabilities.nonzero()[-1]))
        return index if order is None else int(order[index])


def draw_of(sampling: Sampling) -> Draw | None:
    """The draws a request needs, or None for greedy decoding."""
    return Draw(sampling) if sampling.temperature > 0 else None
