"""Training: peft LoRA on the plan's frozen A, only B learns, by transformers' Trainer; repeatable to the last bit.

The learning rate falls linearly after a short warm-up, AdamW has no weight decay, gradients are clipped to norm 1. The
base model computes in the plan's dtype; A, B and z are fp32, as they are when the gateway serves them.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from seqr.plan import Plan
from silo_client.checkpoints import SealCheckpoints, latest_whole
from silo_client.dataset import Schedule, collate
from silo_client.errors import ModuleMismatch, TrainingDiverged
from silo_client.prefix import PrefixSharingTrainer

log = logging.getLogger("seqr.silo")

# Raised whenever a change here may change the bytes of an adapter, so that no cached one is taken for a new one.
RECIPE = 2
ADAPTER_NAME = "default"

# (step, steps, loss): called after every optimizer step; never sees a record.
Progress = Callable[[int, int, float], None]


def adapt(model: Any, plan: Plan, shared_a: dict[str, torch.Tensor]) -> PeftModel:
    """Wrap the plan's Linears of ``model`` in LoRA: A is the plan's and frozen, B is zero and learns.

    Raises:
        ModuleMismatch: the base model does not have exactly the plan's Linears.
    """
    for spec in plan.modules:
        try:
            linear = model.get_submodule(spec.name)
        except AttributeError:
            raise ModuleMismatch(
                f"the base model has no module {spec.name}, which plan {plan.plan_id} adapts"
            ) from None
        expected = (spec.out_features, spec.in_features)
        if not isinstance(linear, torch.nn.Linear) or (linear.out_features, linear.in_features) != expected:
            raise ModuleMismatch(
                f"module {spec.name} of the base model is not the {expected[0]} x {expected[1]} Linear "
                f"of plan {plan.plan_id}"
            )
    lora = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=[spec.name for spec in plan.modules],
    )
    adapted = get_peft_model(model, lora, adapter_name=ADAPTER_NAME)
    # peft writes this name into every checkpoint and asks the model hub about it; neither is wanted here.
    adapted.peft_config[ADAPTER_NAME].base_model_name_or_path = ""
    for name, layer in lora_layers(adapted, plan).items():
        weight = layer.lora_A[ADAPTER_NAME].weight
        with torch.no_grad():
            weight.copy_(shared_a[name])
        weight.requires_grad_(False)
    learns = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    if len(learns) != len(plan.modules) or not all(".lora_B." in name for name in learns):
        raise ModuleMismatch(
            f"peft adapted {len(learns)} modules of the base model where the plan names {len(plan.modules)}"
        )
    return adapted


def lora_layers(adapted: PeftModel, plan: Plan) -> dict[str, Any]:
    """peft's LoRA layer for each of the plan's modules, in plan order."""
    base = adapted.get_base_model()
    return {spec.name: base.get_submodule(spec.name) for spec in plan.modules}


def train(
    adapted: PeftModel,
    schedule: Schedule,
    plan: Plan,
    *,
    seed: int,
    device: str,
    pad_token: int,
    checkpoints: Path,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Train every B, resuming from the last whole checkpoint in ``checkpoints``, and return them.

    Returns:
        B fp32 [m, r] per module, without the LoRA scale.

    Raises:
        TrainingDiverged: a B is not finite.
    """
    limits = plan.training
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=limits.max_steps,
        per_device_train_batch_size=limits.batch_size,
        learning_rate=limits.learning_rate,
        warmup_steps=min(limits.warmup_steps, limits.max_steps - 1),
        lr_scheduler_type="linear",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        use_cpu=device == "cpu",
        save_strategy="steps",
        save_steps=save_interval(limits.max_steps),
        # Two, because the Trainer deletes the older one before the newer one is sealed.
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    # On a machine with several GPUs the Trainer would split each batch over all of them.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = PrefixSharingTrainer(
        model=adapted,
        args=arguments,
        train_dataset=schedule,
        data_collator=partial(collate, pad_token=pad_token),
        callbacks=[SealCheckpoints(), *([_Report(progress)] if progress else [])],
    )
    trainer.remove_callback(PrinterCallback)
    resumed = latest_whole(checkpoints)
    if resumed is not None:
        log.info("training resumes after a stop")
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    factors = {
        name: layer.lora_B[ADAPTER_NAME].weight.detach().to("cpu", torch.float32).contiguous()
        for name, layer in lora_layers(adapted, plan).items()
    }
    if not all(bool(torch.isfinite(b).all()) for b in factors.values()):
        raise TrainingDiverged(
            f"training did not stay finite: the plan's learning rate {limits.learning_rate} is too high for this data"
        )
    return factors


def save_interval(steps: int) -> int:
    """Steps between checkpoints: some eight in a short run, never more than fifty steps lost in a long one."""
    return min(50, max(1, math.ceil(steps / 8)))


class _Report(TrainerCallback):  # type: ignore[misc]
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        if logs and "loss" in logs:
            self._progress(state.global_step, state.max_steps, float(logs["loss"]))
        return control
