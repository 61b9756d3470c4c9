"""The same records give the same bytes: in any file order, after kill -9, and whatever was deleted before."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seqr.models import load_base_model
from seqr.plan import create_plan
from seqr.shared_a import verify_a
from silo_client.adapters import obtain_adapter
from silo_client.base import load_encoder
from silo_client.checkpoints import SEAL, latest_whole
from silo_client.dataset import Schedule, collate
from silo_client.errors import BaseModelMismatch, DataError, ModuleMismatch
from silo_client.export import export
from silo_client.prefix import prefix_length, share_prefix
from silo_client.records import collect
from silo_client.training import ADAPTER_NAME, adapt, lora_layers, train

from .conftest import Federation, Silo, rows


def nobody(_subject: str) -> bool:
    return False


def test_file_order_does_not_show_in_the_adapter(make_silo: Callable[..., Silo], federation: Federation) -> None:
    one, other = make_silo("one"), make_silo("other", records=rows()[::-1])
    first = obtain_adapter(one.config, one.state, federation.plan)
    second = obtain_adapter(other.config, other.state, federation.plan)
    assert first.adapter.to_bytes() == second.adapter.to_bytes()
    assert not second.reused


def test_unchanged_records_and_plan_are_not_trained_again(silo: Silo, federation: Federation) -> None:
    first = obtain_adapter(silo.config, silo.state, federation.plan)
    silo.write(rows()[::-1])
    again = obtain_adapter(silo.config, silo.state, federation.plan)
    assert again.reused
    assert again.adapter.digest == first.adapter.digest
    silo.write(rows()[:-1])
    assert not obtain_adapter(silo.config, silo.state, federation.plan).reused


def test_a_cached_adapter_with_a_flipped_byte_is_trained_again(silo: Silo, federation: Federation) -> None:
    first = obtain_adapter(silo.config, silo.state, federation.plan)
    (stored,) = (silo.config.state_dir / "adapters").glob("*.safetensors")
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    again = obtain_adapter(silo.config, silo.state, federation.plan)
    assert not again.reused
    assert again.adapter.digest == first.adapter.digest


def test_the_same_records_at_two_silos_have_unlike_dataset_roots(
    make_silo: Callable[..., Silo], federation: Federation
) -> None:
    one, other = make_silo("one"), make_silo("other", silo_id="silo-b")
    first = obtain_adapter(one.config, one.state, federation.plan)
    second = obtain_adapter(other.config, other.state, federation.plan)
    assert first.dataset_root != second.dataset_root


KILLED = """
import os, signal, sys
from silo_client.quiet import quiet
quiet()
from pathlib import Path
from silo_client.adapters import obtain_adapter
from silo_client.config import load_config
from silo_client.state import State
from seqr.dsse import Envelope
from seqr.keys import VerifyKey
from seqr.plan import verify_plan
config = load_config(sys.argv[1])
key = VerifyKey.from_b64(config.coordinator.public_key)
plan = verify_plan(Envelope.from_json(Path(sys.argv[2]).read_bytes()), key)
def progress(step, steps, loss):
    if step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
obtain_adapter(config, State.open(config), plan, progress=progress)
"""


def test_a_training_killed_in_the_middle_resumes_to_the_same_bytes(
    make_silo: Callable[..., Silo], federation: Federation, tmp_path: Path
) -> None:
    whole, killed = make_silo("whole"), make_silo("killed")
    (tmp_path / "plan.json").write_bytes(federation.plan_env)
    command = [sys.executable, "-c", KILLED, str(killed.directory), str(tmp_path / "plan.json"), "4"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not list((killed.config.state_dir / "adapters").iterdir())
    steps: list[int] = []
    resumed = obtain_adapter(killed.config, killed.state, federation.plan, progress=lambda step, *_: steps.append(step))
    assert steps[0] > 1, "the resumed run began anew"
    uninterrupted = obtain_adapter(whole.config, whole.state, federation.plan)
    assert resumed.adapter.to_bytes() == uninterrupted.adapter.to_bytes()
    assert not list((killed.config.state_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("damage", ["unsealed", "flipped", "seal_is_nonsense"])
def test_a_checkpoint_that_was_being_written_when_the_process_died_is_not_believed(
    silo: Silo, federation: Federation, damage: str
) -> None:
    folder = silo.config.state_dir / "checkpoints" / "x"

    class Stopped(Exception):
        pass

    def stop(step: int, _steps: int, _loss: float) -> None:
        if step == 4:
            raise Stopped

    with pytest.raises(Stopped):
        _train_once(silo, federation, folder, stop)
    newest = latest_whole(folder)
    assert newest is not None
    if damage == "unsealed":
        (newest / SEAL).unlink()
    elif damage == "flipped":
        optimizer = newest / "optimizer.pt"
        content = bytearray(optimizer.read_bytes())
        content[len(content) // 2] ^= 1
        optimizer.write_bytes(content)
    else:
        (newest / SEAL).write_text("{")
    older = latest_whole(folder)
    assert older is not None
    assert older.name != newest.name
    assert not newest.exists()


def _train_once(silo: Silo, federation: Federation, folder: Path, progress: object) -> None:
    plan = federation.plan
    model, tokenizer = load_base_model(federation.model, torch.float32)
    adapted = adapt(model, plan, verify_a(plan))
    examples, _ = load_encoder(silo.config, plan).encode_all(collect(silo.config, is_erased=nobody).records)
    schedule = Schedule(examples, plan.plan_id, plan.training.max_steps, plan.training.batch_size)
    train(
        adapted, schedule, plan, seed=1, device="cpu", pad_token=tokenizer.pad_token_id, checkpoints=folder,
        progress=progress,  # type: ignore[arg-type]
    )  # fmt: skip


def test_only_b_learns_and_a_stays_the_plans(silo: Silo, federation: Federation, tmp_path: Path) -> None:
    plan = federation.plan
    shared_a = verify_a(plan)
    model, tokenizer = load_base_model(federation.model, torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    adapted = adapt(model, plan, shared_a)
    examples, _ = load_encoder(silo.config, plan).encode_all(collect(silo.config, is_erased=nobody).records)
    schedule = Schedule(examples, plan.plan_id, 2, 4)
    factors = train(
        adapted,
        schedule,
        replace(plan, training=replace(plan.training, max_steps=2)),
        seed=1,
        device="cpu",
        pad_token=tokenizer.pad_token_id,
        checkpoints=tmp_path / "c",
    )
    layers = lora_layers(adapted, plan)
    for spec in plan.modules:
        assert torch.equal(layers[spec.name].lora_A[ADAPTER_NAME].weight, shared_a[spec.name])
        assert torch.equal(layers[spec.name].base_layer.weight, before[f"{spec.name}.weight"])
        assert factors[spec.name].abs().max() > 0


def test_the_exported_factors_and_moments_are_those_of_the_definition(
    silo: Silo, federation: Federation, tmp_path: Path
) -> None:
    plan = federation.plan
    model, tokenizer = load_base_model(federation.model, torch.float32)
    adapted = adapt(model, plan, verify_a(plan))
    examples, _ = load_encoder(silo.config, plan).encode_all(collect(silo.config, is_erased=nobody).records)
    schedule = Schedule(examples, plan.plan_id, 6, 4)
    factors = train(
        adapted, schedule, plan, seed=1, device="cpu", pad_token=tokenizer.pad_token_id, checkpoints=tmp_path / "c"
    )
    adapter = export(adapted, plan, factors, examples, tokenizer.pad_token_id)
    name = plan.modules[3].name
    layer = lora_layers(adapted, plan)[name]
    product = adapter.modules[name].q.double() @ adapter.modules[name].r.double()
    assert torch.allclose(product, plan.scale * factors[name].double(), atol=1e-6)

    inputs: list[torch.Tensor] = []
    handle = layer.base_layer.register_forward_hook(lambda _m, args, _o: inputs.append(args[0][0, 1:]))
    with torch.no_grad():
        for example in examples:
            adapted(input_ids=torch.tensor([example.tokens]))
    handle.remove()
    update = torch.cat(inputs).double() @ layer.lora_A[ADAPTER_NAME].weight.double().T @ factors[name].double().T
    norms = (plan.scale * update).norm(dim=1)
    assert adapter.modules[name].mu == pytest.approx(float(norms.mean()), rel=1e-4)
    assert adapter.modules[name].sigma == pytest.approx(float(norms.std(correction=0)), rel=1e-4)


def test_the_loss_is_on_the_completion_and_its_end_of_turn_alone(silo: Silo, federation: Federation) -> None:
    _, tokenizer = load_base_model(federation.model, torch.float32)
    (record,) = collect(silo.config, is_erased=nobody).records[:1]
    example = load_encoder(silo.config, federation.plan).encode(record)
    batch = collate([example], 0)
    learnt = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(learnt) == f"{record.completion}<|im_end|>"
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": record.prompt}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(example.tokens[: example.prompt_length]) == asked


def test_sharing_the_common_prefix_changes_neither_loss_nor_gradient(silo: Silo, federation: Federation) -> None:
    plan = federation.plan
    model, _ = load_base_model(federation.model, torch.float32)
    adapted = adapt(model, plan, verify_a(plan))
    with torch.no_grad():
        for layer in lora_layers(adapted, plan).values():
            layer.lora_B[ADAPTER_NAME].weight.normal_(0, 0.02)
    examples, _ = load_encoder(silo.config, plan).encode_all(collect(silo.config, is_erased=nobody).records)
    batch = collate(examples, 0)
    assert prefix_length(batch["input_ids"], int(batch["logits_to_keep"][0])) > 10
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    results = []
    for inputs in (plain, batch, share_prefix(adapted, batch)):
        adapted.zero_grad()
        loss = adapted(**inputs).loss
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in adapted.parameters() if p.grad is not None]))
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        for got, expected in zip(gradients, results[0][1], strict=True):
            assert torch.allclose(got, expected, rtol=1e-3, atol=1e-6)


def test_a_base_model_that_is_not_the_plans_is_refused(silo: Silo, federation: Federation) -> None:
    other = replace(federation.plan, base_model_digest="sha256:" + "0" * 64)
    with pytest.raises(BaseModelMismatch, match="was made for tiny with sha256:0000"):
        obtain_adapter(silo.config, silo.state, other)


def test_a_plan_for_modules_that_the_model_lacks_is_refused(federation: Federation) -> None:
    plan = federation.plan
    other = create_plan(
        federation="test",
        base_model="tiny",
        base_model_digest=plan.base_model_digest,
        modules=[replace(plan.modules[0], name="model.layers.9.nowhere")],
        rank=4,
        alpha=8,
        seed=7,
        gateway_keys=plan.gateway_keys,
    )
    model, _ = load_base_model(federation.model, torch.float32)
    with pytest.raises(ModuleMismatch, match=r"has no module model\.layers\.9\.nowhere"):
        adapt(model, other, verify_a(other))


def test_bad_rows_leave_no_trace_of_a_training(silo: Silo, federation: Federation) -> None:
    silo.data.write_text("nonsense\n")
    with pytest.raises(DataError):
        obtain_adapter(silo.config, silo.state, federation.plan)
    assert not list((silo.config.state_dir / "adapters").iterdir())
    assert not list((silo.config.state_dir / "checkpoints").iterdir())
