"""Checkpoints: cut the power anywhere, fill the disk, flip any bit; a whole one is always there."""

import errno
import hashlib
import json
import logging
import os
import random

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl import checkpoint
from reasonrl.checkpoint import Disk, checkpoints, latest_verified, load, save
from reasonrl.records import InputError
from reasonrl.state_file import load_state, rng_state, save_state, set_rng_state
from reasonrl.tasks.base import Draws


def write(step, disk=None):
    """A writer of two files, one in a folder; with a disk, its writes are cut points too."""

    def writer(folder):
        (folder / "sub").mkdir()
        for name in ("weights.bin", "sub/state.json"):
            data = f"{name} of step {step} ".encode() * 20
            (disk.write if disk else Disk().write)(folder / name, data)

    return writer


def content(path):
    return {
        p.relative_to(path).as_posix(): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name != "manifest.json"
    }


def expected(step):
    return {n: f"{n} of step {step} ".encode() * 20 for n in ("sub/state.json", "weights.bin")}


class Cut(Disk):
    """Kills the process before, after or (writes) in the middle of operation number `at`."""

    def __init__(self, at, moment):
        self.at, self.moment, self.count = at, moment, 0

    def _around(self, operation, *args):
        here = self.count == self.at
        self.count += 1
        if here and self.moment == "before":
            os._exit(9)
        if here and self.moment == "middle":
            self._half(operation, *args)
            os._exit(9)
        getattr(Disk, operation)(self, *args)
        if here and self.moment == "after":
            os._exit(9)

    def _half(self, operation, path, *rest):
        if operation == "write":
            path.write_bytes(rest[0][: len(rest[0]) // 2])
        elif operation == "remove":
            next(p for p in sorted(path.rglob("*")) if p.is_file()).unlink()

    def mkdir(self, path):
        self._around("mkdir", path)

    def write(self, path, data):
        self._around("write", path, data)

    def sync(self, path):
        self._around("sync", path)

    def rename(self, old, new):
        self._around("rename", old, new)

    def remove(self, path):
        self._around("remove", path)


def killed(run_dir, step, at, moment, keep=1):
    """Save in a child that dies at the given point; its exit status."""
    child = os.fork()
    if child == 0:
        disk = Cut(at, moment)
        save(run_dir, step, write(step, disk), {}, keep=keep, disk=disk)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("moment", ["before", "middle", "after"])
@pytest.mark.parametrize("step", [20, 10])  # a new step, and the same step once more
def test_killed_at_any_point_a_whole_checkpoint_is_left(tmp_path, moment, step):
    points = 0
    for at in range(60):
        run_dir = tmp_path / f"{step}-{moment}-{at}"
        save(run_dir, 10, write(10), {}, keep=1)
        status = killed(run_dir, step, at, moment)
        found = latest_verified(run_dir)
        assert found is not None and found.name in ("checkpoint-10", f"checkpoint-{step}")
        assert content(found) == expected(int(found.name.split("-")[1]))
        assert not [p for p in run_dir.iterdir() if not p.name.startswith("checkpoint-")]
        save(run_dir, 30, write(30), {}, keep=1)  # and the run goes on
        assert latest_verified(run_dir).name == "checkpoint-30"
        if status == 0:
            assert found.name == f"checkpoint-{step}"
            break
        points += 1
    assert points >= 14


def test_everything_is_flushed_before_the_one_rename(tmp_path):
    """What a power cut may lose: nothing that the published name can reach."""
    log = []

    class Recorder(Disk):
        def write(self, path, data):
            super().write(path, data)
            log.append(("write", path))

        def sync(self, path):
            super().sync(path)
            log.append(("sync", path))

        def rename(self, old, new):
            log.append(("rename", old))
            super().rename(old, new)

    disk = Recorder()
    save(tmp_path, 1, write(1, disk), {}, disk=disk)
    (at,) = [i for i, (what, _) in enumerate(log) if what == "rename"]
    aside = log[at][1]
    synced = [path for what, path in log[:at] if what == "sync"]
    names = ("weights.bin", "sub/state.json", "sub", "manifest.json")
    assert {aside / name for name in names} | {aside} == set(synced)
    assert log[at - 3 : at] == [
        ("write", aside / "manifest.json"),
        ("sync", aside / "manifest.json"),
        ("sync", aside),
    ]
    assert log[at + 1 :] == [("sync", tmp_path)]


def test_retention_keeps_the_newest_and_never_less_than_one(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, write(step), {}, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [10, 3]
    save(tmp_path, 11, write(11), {}, keep=1)
    assert [step for step, _ in checkpoints(tmp_path)] == [11]
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        save(tmp_path, 12, write(12), {}, keep=0)


def test_a_damaged_newer_checkpoint_never_crowds_out_the_whole_one(tmp_path, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step, write(step), {}, keep=3)
    (tmp_path / "checkpoint-3" / "weights.bin").write_bytes(b"")
    with caplog.at_level(logging.ERROR):
        assert latest_verified(tmp_path).name == "checkpoint-2"
    assert len(caplog.records) == 1
    assert "DAMAGED CHECKPOINT passed over" in caplog.text and "weights.bin" in caplog.text
    save(tmp_path, 2, write(2), {}, keep=1)
    assert [step for step, _ in checkpoints(tmp_path)] == [2]
    assert content(latest_verified(tmp_path)) == expected(2)


def test_without_any_whole_checkpoint_nothing_starts_from_scratch(tmp_path):
    assert latest_verified(tmp_path) is None and latest_verified(tmp_path / "absent") is None
    save(tmp_path, 1, write(1), {})
    (tmp_path / "checkpoint-1" / "manifest.json").unlink()
    with pytest.raises(InputError, match="none of 1 checkpoints is whole"):
        latest_verified(tmp_path)


def test_the_manifest_says_what_is_there(tmp_path):
    path = save(tmp_path, 7, write(7), {"config": "abc", "position": {"step": 7}})
    manifest = load(path)
    assert manifest["step"] == 7 and manifest["world_size"] == 1
    assert manifest["meta"] == {"config": "abc", "position": {"step": 7}}
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    data = expected(7)["weights.bin"]
    record = manifest["files"]["weights.bin"]
    assert record["size"] == len(data)
    assert record["blake2b"] == hashlib.blake2b(data, digest_size=32).hexdigest()
    assert set(manifest["files"]) == {"weights.bin", "sub/state.json"}


def test_500_truncations_and_500_flips_are_all_found(tmp_path):
    save(tmp_path, 1, write(1), {})
    path = save(tmp_path, 2, write(2), {"x": 1.5})
    files = [path / name for name in ("weights.bin", "sub/state.json", "manifest.json")]
    whole = {file: file.read_bytes() for file in files}
    draws = Draws("damage")
    for trial in range(1000):
        file = draws.choice(files)
        data = bytearray(whole[file])
        at = draws.below(len(data))
        if trial % 2:
            data[at] ^= 1 << draws.below(8)
        else:
            del data[at:]
        file.write_bytes(data)
        with pytest.raises(InputError):
            load(path)
        if trial % 50 == 0:
            assert latest_verified(tmp_path).name == "checkpoint-1"
        file.write_bytes(whole[file])
    assert latest_verified(tmp_path) == path


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=60)
    | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(
        lambda value: json.dumps(value).encode()
    )
    | st.dictionaries(
        st.sampled_from(["format", "files", "step", "blake2b"]), st.integers() | st.text()
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_manifest_gives_a_typed_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("m")
    (path / "manifest.json").write_bytes(data)
    with pytest.raises(InputError):
        load(path)


@pytest.mark.parametrize("files", [{"../x": {"size": 0, "blake2b": ""}}, {"a": 3}, [], None])
def test_a_well_hashed_manifest_cannot_reach_outside(tmp_path, files):
    body = {"format": 1, "files": files}
    whole = body | {"blake2b": checkpoint._hash(checkpoint._canonical(body))}
    (tmp_path / "manifest.json").write_bytes(checkpoint._canonical(whole))
    with pytest.raises(InputError, match="manifest.json"):
        load(tmp_path)


def test_a_full_disk_at_50_offsets_leaves_the_last_good_one(tmp_path):
    save(tmp_path, 1, write(1), {})
    sizes = [p.stat().st_size for p in (tmp_path / "checkpoint-1").rglob("*") if p.is_file()]

    class Quota(Disk):
        left = 0

        def write(self, path, data):
            super().write(path, data[: self.left])
            if len(data) > self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.left -= len(data)

    for k in range(50):
        disk = Quota()
        disk.left = k * sum(sizes) // 50
        with pytest.raises(InputError, match="no space left .* the last one kept is checkpoint-1"):
            save(tmp_path, 2, write(2, disk), {}, disk=disk)
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert content(latest_verified(tmp_path)) == expected(1)


def test_a_device_that_is_really_full(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("SKIPPED: no /dev/full on this machine")

    def writer(folder):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x" * 100)

    with pytest.raises(InputError, match="no space left for checkpoint-3; there is no earlier one"):
        save(tmp_path, 3, writer, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="checkpoint-1 cannot be written"):
        save(tmp_path / "file" / "run", 1, write(1), {})


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def writer(folder):
        (folder / "a").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, writer, {})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="plain files only"):
        save(tmp_path, 1, lambda folder: (folder / "link").symlink_to("/etc/passwd"), {})


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
