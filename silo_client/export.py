"""From trained factors to the adapter that leaves: Q and R by factorization, mu and sigma of the silo's own tokens."""

from collections.abc import Sequence

import torch
from peft import PeftModel

from seqr.adapter import Adapter, ModuleAdapter
from seqr.calibration import RunningMoments, norms
from seqr.factorize import factorize
from seqr.plan import Plan
from silo_client.dataset import Example, collate
from silo_client.training import ADAPTER_NAME, lora_layers

CALIBRATION_BATCH = 16
# Some two thousand tokens settle a mean and a deviation; all records would cost a quarter of a short training.
CALIBRATION_RECORDS = 32


def export(
    adapted: PeftModel, plan: Plan, factors: dict[str, torch.Tensor], examples: Sequence[Example], pad_token: int
) -> Adapter:
    """The adapter of a trained model.

    Args:
        factors: B fp32 [m, r] per module, without the LoRA scale.
        examples: what was trained on, each once, in a drawn order that does not depend on the files; the first of
            them are the sample that mu and sigma come from.
    """
    qr = {name: factorize(b, plan.scale) for name, b in factors.items()}
    r = {name: r for name, (_, r) in qr.items()}
    moments = own_moments(adapted, plan, r, examples[:CALIBRATION_RECORDS], pad_token)
    return Adapter(
        {name: ModuleAdapter(q=q, r=r, mu=moments[name].mean, sigma=moments[name].std) for name, (q, r) in qr.items()}
    )


@torch.no_grad()
def own_moments(
    adapted: PeftModel, plan: Plan, r: dict[str, torch.Tensor], examples: Sequence[Example], pad_token: int
) -> dict[str, RunningMoments]:
    """Mean and deviation of ||R z|| per module over all tokens of ``examples``, in one pass with this adapter active.

    Position 0 is left out: it is an attention sink, and its activation says nothing.
    """
    moments = {name: RunningMoments() for name in r}
    counted: torch.Tensor = torch.zeros(0, dtype=torch.bool)
    device = next(adapted.parameters()).device
    layers = lora_layers(adapted, plan)

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        factor = r[name].to(device)

        def record(_module: torch.nn.Module, _inputs: object, z: torch.Tensor) -> None:
            moments[name].update(norms(factor, z[counted]).cpu())

        handle: torch.utils.hooks.RemovableHandle = layers[name].lora_A[ADAPTER_NAME].register_forward_hook(record)
        return handle

    handles = [watch(name) for name in r]
    adapted.eval()
    try:
        for start in range(0, len(examples), CALIBRATION_BATCH):
            batch = collate(examples[start : start + CALIBRATION_BATCH], pad_token)
            counted = batch["attention_mask"].bool().to(device)
            counted[:, 0] = False
            # Only the last position's logits: the vocabulary would cost as much as the model.
            adapted(
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                logits_to_keep=1,
            )
    finally:
        for handle in handles:
            handle.remove()
    return moments
