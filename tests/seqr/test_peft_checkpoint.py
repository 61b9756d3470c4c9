"""A checkpoint of the real peft goes through A, Q, R and back without changing what its model says."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from seqr.adapter_cli import AdapterFileUnusable, app
from seqr.models import linear_module_names, load_base_model
from seqr.peft_checkpoint import CONFIG, WEIGHTS, CheckpointExists, CheckpointUnreadable, read_checkpoint
from seqr.routed_linear import ModelMismatch
from seqr.routers.mixture_model import MixtureModel
from seqr.routers.oracle import OracleRouter
from seqr.routers.pool import AdapterPool, LoraFactors
from tests.seqr.routers.conftest import make_batch

IDS = torch.tensor([[5, 9, 40, 7, 22, 80], [6, 3, 3, 11, 30, 2]])


@pytest.fixture
def checkpoint(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return save(tiny_model_dir, tmp_path / "checkpoint")


def save(model_dir: Path, where: Path, seed: int = 0, **options: object) -> Path:
    """What peft saves for the tiny model, with random factors in place of trained ones."""
    model, _ = load_base_model(model_dir, torch.float32)
    names = [spec.name for spec in linear_module_names(model, "attention")]
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=names, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    adapted.save_pretrained(where)
    return where


def logits(model_dir: Path, checkpoint: Path) -> torch.Tensor:
    model, _ = load_base_model(model_dir, torch.float32)
    with torch.inference_mode():
        return PeftModel.from_pretrained(model, checkpoint)(input_ids=IDS).logits


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_checkpoint_says_the_same_after_import_and_export(
    rslora: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    checkpoint = save(tiny_model_dir, tmp_path / "checkpoint", use_rslora=rslora)
    said = run("import", checkpoint, tmp_path / "factored.safetensors")
    assert "8 modules of rank 4" in said
    tensors = load_file(tmp_path / "factored.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"a", "q", "r"}
    q, r = (tensors[f"model.layers.0.self_attn.q_proj.{part}"] for part in "qr")
    torch.testing.assert_close(q.T @ q, torch.eye(4))
    assert torch.equal(r, r.triu())
    run("export", tmp_path / "factored.safetensors", tmp_path / "back", "--base-model", "tiny")
    before, after = logits(tiny_model_dir, checkpoint), logits(tiny_model_dir, tmp_path / "back")
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "back" / CONFIG).read_text())["base_model_name_or_path"] == "tiny"


def test_a_pool_of_peft_checkpoints_routed_by_the_oracle_is_pefts_own_output(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    paths = {name: save(tiny_model_dir, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))}
    pool = AdapterPool({name: read_checkpoint(path) for name, path in paths.items()})
    model, _ = load_base_model(tiny_model_dir, torch.float32)
    with torch.inference_mode():
        plain = model(input_ids=IDS).logits
        mixed = MixtureModel(model, pool)
        router = OracleRouter(pool, lambda batch: torch.tensor([1, 0]))
        with mixed.routed(router, make_batch(2, (6, 6)), IDS):
            routed = model(input_ids=IDS).logits
        mixed.close()
        assert torch.equal(model(input_ids=IDS).logits, plain)
    torch.testing.assert_close(routed[0], logits(tiny_model_dir, paths["two"])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(routed[1], logits(tiny_model_dir, paths["one"])[1], rtol=1e-4, atol=1e-5)


def test_a_pool_is_refused_by_a_model_without_its_modules(tiny_model_dir: Path) -> None:
    model, _ = load_base_model(tiny_model_dir, torch.float32)
    for module, message in (
        ("model.layers.9.mlp.up_proj", "the base model has no module model.layers.9.mlp.up_proj"),
        ("model.layers.0.mlp.up_proj", "is 64 to 128 in the base model, and 3 to 5 in the adapters' pool"),
    ):
        with pytest.raises(ModelMismatch, match=message):
            MixtureModel(model, AdapterPool({"one": {module: LoraFactors(torch.ones(2, 3), torch.ones(5, 2))}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "VERA"}, "an adapter of type VERA, not LORA"),
        ({"use_dora": True}, "uses use_dora"),
        ({"alpha_pattern": {"q_proj": 3}}, "uses alpha_pattern"),
        ({"bias": "all"}, "trains biases"),
        ({"r": 5}, "which is not rank 5"),
    ],
)
def test_a_checkpoint_that_two_factors_cannot_express_is_refused_by_name(
    checkpoint: Path, change: dict[str, object], message: str
) -> None:
    config = json.loads((checkpoint / CONFIG).read_text())
    (checkpoint / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(CheckpointUnreadable, match=message):
        read_checkpoint(checkpoint)


def test_a_directory_that_is_no_whole_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnreadable, match="give a directory that peft saved"):
        read_checkpoint(tmp_path / "nowhere")
    tensors = load_file(checkpoint / WEIGHTS)
    dropped = sorted(tensors)[0]
    for named, message in (
        ({name: tensor for name, tensor in tensors.items() if name != dropped}, "has only lora_B"),
        (tensors | {"base_model.model.lm_head.weight": torch.ones(2)}, "neither lora_A nor lora_B"),
        ({}, "adapts no module"),
    ):
        save_file(named, checkpoint / WEIGHTS)
        with pytest.raises(CheckpointUnreadable, match=message):
            read_checkpoint(checkpoint)
    (checkpoint / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(CheckpointUnreadable, match="cannot be read as safetensors"):
        read_checkpoint(checkpoint)


def test_import_and_export_overwrite_nothing_and_name_an_unusable_file(checkpoint: Path, tmp_path: Path) -> None:
    factored = tmp_path / "factored.safetensors"
    run("import", checkpoint, factored)
    with pytest.raises(AdapterFileUnusable, match="exists; choose a new file"):
        run("import", checkpoint, factored)
    with pytest.raises(CheckpointExists, match="is not empty"):
        run("export", factored, checkpoint)
    with pytest.raises(AdapterFileUnusable, match="cannot be read: No such file"):
        run("export", tmp_path / "gone", tmp_path / "out")
    save_file({"m.a": torch.ones(2, 3)}, tmp_path / "half")
    with pytest.raises(AdapterFileUnusable, match="must have a, q and r for every module; it differs in m"):
        run("export", tmp_path / "half", tmp_path / "out")
