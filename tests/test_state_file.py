"""State on disk: exact round trips without pickle, typed errors for damage."""

import random

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl.records import InputError
from reasonrl.state_file import load_state, rng_state, save_state, set_rng_state


def _raw(tensor):
    return tensor.reshape(-1).contiguous().view(torch.uint8).tolist()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return (
            type(a) is type(b)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and (_raw(a) == _raw(b))
        )
    if isinstance(a, numpy.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return (
            type(b) is dict
            and list(a) == list(b)
            and all(same(a[k], b[k]) for k in a)
            and ([type(k) for k in a] == [type(k) for k in b])
        )
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a and b != b) and repr(a) == repr(b)


def test_state_round_trips_exactly(tmp_path):
    base = torch.arange(12, dtype=torch.float32)
    tree = {
        "plain": [
            None,
            True,
            False,
            0,
            -0.0,
            1e-320,
            0.1,
            float("nan"),
            float("-inf"),
            2**70,
            "é\ud800",
        ],
        3: (1, [2, (3,)], {}),
        (1, "a"): {"bytes": b"\x00\xff", "empty": [(), [], b"", ""]},
        "tensors": [base, base[2:4], base[::2], base, torch.tensor(3.5), torch.zeros(0, 3)],
        "kinds": [
            torch.ones(2, dtype=d) for d in (torch.bfloat16, torch.int64, torch.bool, torch.uint8)
        ],
        "arrays": [
            numpy.arange(5, dtype=numpy.uint32),
            numpy.zeros((2, 0)),
            numpy.ones((2, 3))[:, ::2],
        ],
        "float": {"float": "nan", "tensor": "t0", "tuple": [1]},  # looks like our own marks
    }
    save_state(tmp_path / "state", tree)
    assert same(load_state(tmp_path / "state"), tree)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.json", "state.safetensors"]


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.booleans(), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(tree=JSONISH)
def test_any_nested_state_round_trips(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("s") / "state"
    save_state(path, tree)
    assert same(load_state(path), tree)


def test_optimizer_and_random_states_continue_bit_for_bit(tmp_path):
    def model_and_optimizer():
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.95))

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            noise = random.random() + float(numpy.random.rand())
            (model(torch.randn(4, 5)) * noise).square().sum().backward()
            optimizer.step()
        return model.weight.detach().clone()

    model, optimizer = model_and_optimizer()
    steps(model, optimizer, 3)
    tree = {"rng": rng_state(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_state(tmp_path / "state", tree)
    unbroken = steps(model, optimizer, 4)
    model, optimizer = model_and_optimizer()
    steps(model, optimizer, 1)
    state = load_state(tmp_path / "state")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    set_rng_state(state["rng"])
    assert torch.equal(steps(model, optimizer, 4), unbroken)


@pytest.mark.parametrize("value", [{1, 2}, object(), torch.float32, lambda: 0])
def test_what_cannot_be_saved_is_named_by_its_place(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\]: a .* cannot be saved"):
        save_state(tmp_path / "state", {"a": [0, value]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"tensor": "t9"}',
        '{"code": "x"}',
        '{"array": ["|O", [1], ""]}',
        "[" * 100_000,
        '{"tuple": 3}',
        '{"dict": [[1]]}',
        '{"dict": [[[], 1]]}',
        '{"bytes": "é"}',
        "{}",
        '{"float": "x"}',
        '{"array": ["<f4", [9], "AAAA"]}',
        '{"tuple": 1, "dict": 2}',
    ],
)
def test_damaged_state_is_a_typed_error(tmp_path, text):
    save_state(tmp_path / "state", [1])
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(InputError, match="damaged state"):
        load_state(tmp_path / "state")


def test_a_pickle_in_place_of_state_is_never_run(tmp_path):
    save_state(tmp_path / "state", {"a": torch.ones(2)})
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    for name in ("state.json", "state.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(bomb)
        with pytest.raises(InputError, match="damaged state"):
            load_state(tmp_path / "state")
        (tmp_path / name).write_bytes(whole)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "state.safetensors").unlink()
    with pytest.raises(InputError, match="state"):
        load_state(tmp_path / "state")
