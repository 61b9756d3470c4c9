import pickle
import struct

import pytest
import torch
from safetensors.torch import save

from seqr.adapter import Adapter, AdapterMalformed, ModuleAdapter


def fixed_adapter(order=("a.q_proj", "b.v_proj")):
    modules = {
        "a.q_proj": ModuleAdapter(torch.eye(3, 2), torch.tensor([[2.0, 0.5], [0.0, 1.0]]), 0.1, 0.25),
        "b.v_proj": ModuleAdapter(torch.eye(2), torch.tensor([[1.0, -1.0], [0.0, 3.0]]), 4.0, 1.0),
    }
    return Adapter({name: modules[name] for name in order})


def test_digests_and_bytes_are_fixed():
    adapter = fixed_adapter()
    assert adapter.digest == "0a673fa8c89fc11c7cbc2468784c32d6bc6eb2547c564a1924123eaddc2ccd0b"
    assert adapter.tensor_digests()["a.q_proj.mu"] == "8842307f3d23878a84a37efa38486bd7a043651294d39572ea0971774e4342bc"
    assert sorted(adapter.tensor_digests()) == [
        f"{m}.{p}" for m in ("a.q_proj", "b.v_proj") for p in ("mu", "q", "r", "sigma")
    ]


def test_equal_adapters_give_equal_bytes_whatever_their_order_and_layout():
    adapter = fixed_adapter(("b.v_proj", "a.q_proj"))
    transposed = Adapter(
        {name: ModuleAdapter(m.q.T.contiguous().T, m.r, m.mu, m.sigma) for name, m in adapter.modules.items()}
    )
    assert adapter.to_bytes() == fixed_adapter().to_bytes() == transposed.to_bytes()
    assert transposed.digest == fixed_adapter().digest


def test_an_adapter_read_back_is_the_same(tiny_plan, make_adapter):
    adapter = make_adapter(tiny_plan)
    again = Adapter.from_bytes(adapter.to_bytes())
    assert again.digest == adapter.digest and again.to_bytes() == adapter.to_bytes()
    for name, module in adapter.modules.items():
        assert torch.equal(again.modules[name].q, module.q) and torch.equal(again.modules[name].r, module.r)
        assert (again.modules[name].mu, again.modules[name].sigma) == (module.mu, module.sigma)


def test_modules_may_share_storage():
    matrix = torch.eye(4)
    adapter = Adapter(
        {"a": ModuleAdapter(matrix[:, :2], matrix[:2, :2], 1.0, 1.0), "b": ModuleAdapter(matrix, matrix, 1.0, 1.0)}
    )
    assert Adapter.from_bytes(adapter.to_bytes()).digest == adapter.digest


def test_a_pickle_is_refused():
    with pytest.raises(AdapterMalformed):
        Adapter.from_bytes(pickle.dumps({"a.q": [1.0]}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_another_dtype_is_refused_by_name(dtype):
    tensors = fixed_adapter().tensors() | {"a.q_proj.q": torch.zeros(3, 2, dtype=dtype)}
    with pytest.raises(AdapterMalformed, match=r"tensor 'a\.q_proj\.q' must be F32, got"):
        Adapter.from_bytes(save(tensors))


def test_smuggled_metadata_is_refused():
    with pytest.raises(AdapterMalformed, match="free-form metadata"):
        Adapter.from_bytes(save(fixed_adapter().tensors(), metadata={"note": "a record"}))


def test_bytes_behind_the_last_tensor_are_refused():
    with pytest.raises(AdapterMalformed):
        Adapter.from_bytes(fixed_adapter().to_bytes() + b"a record")


def test_a_truncated_file_is_refused_at_every_length():
    data = fixed_adapter().to_bytes()
    for length in range(len(data)):
        with pytest.raises(AdapterMalformed):
            Adapter.from_bytes(data[:length])


@pytest.mark.parametrize("size", [2**63, 2**40, 10_000])
def test_a_header_that_claims_more_than_there_is_is_refused(size):
    with pytest.raises(AdapterMalformed, match="header claims"):
        Adapter.from_bytes(struct.pack("<Q", size) + fixed_adapter().to_bytes()[8:])


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{", b'{"a":1}', b'{"a.q":{"dtype":"F32"}}', b'{"a.q":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'],
)
def test_a_nonsense_header_is_refused(header):
    with pytest.raises(AdapterMalformed):
        Adapter.from_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


def test_overlapping_tensors_are_refused():
    entry = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = b'{"a.q":' + entry + b',"a.r":' + entry + b"}"
    with pytest.raises(AdapterMalformed):
        Adapter.from_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


@pytest.mark.parametrize("change", ["missing", "unknown", "mu is a vector"])
def test_a_module_without_exactly_its_four_parts_is_refused(change):
    tensors = fixed_adapter().tensors()
    if change == "missing":
        del tensors["a.q_proj.sigma"]
    elif change == "unknown":
        tensors["a.q_proj.extra"] = torch.zeros(1)
    else:
        tensors["a.q_proj.mu"] = torch.zeros(2)
    with pytest.raises(AdapterMalformed, match=r"a\.q_proj"):
        Adapter.from_bytes(save(tensors))
