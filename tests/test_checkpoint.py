"""Checkpoints: cut the power anywhere, fill the disk, flip any bit; a whole one is always there."""

import errno
import hashlib
import json
import logging
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl import checkpoint
from reasonrl.checkpoint import Disk, checkpoints, latest_verified, load, save
from reasonrl.records import InputError
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


def test_a_save_that_died_before_retention_is_made_good(tmp_path):
    """The last save of a run: nothing will be saved after it."""
    save(tmp_path, 10, write(10), {}, keep=1)
    for at in range(60):  # until it dies between the two
        if killed(tmp_path, 20, at, "before") and len(checkpoints(tmp_path)) == 2:
            break
    assert [step for step, _ in checkpoints(tmp_path)] == [20, 10]
    assert latest_verified(tmp_path, keep=1).name == "checkpoint-20"
    assert [step for step, _ in checkpoints(tmp_path)] == [20]


def test_a_save_removes_what_killed_ones_left(tmp_path):
    assert killed(tmp_path, 1, 5, "after") == 9
    assert [p.name[:4] for p in tmp_path.iterdir()] == ["tmp-"]
    save(tmp_path, 1, write(1), {})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_save_removes_what_killed_ones_of_its_step_replaced(tmp_path, moment):
    """A run that starts anew saves its reference without a look at what is there."""
    for at in range(60):
        run_dir = tmp_path / str(at)
        save(run_dir, 1, write(1), {}, keep=1)
        status = killed(run_dir, 1, at, moment)
        save(run_dir, 1, write(1), {}, keep=1)
        assert [p.name for p in run_dir.iterdir()] == ["checkpoint-1"]
        if status == 0:
            break
    assert at >= 9


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
