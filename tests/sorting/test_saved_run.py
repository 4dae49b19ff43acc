"""An unfinished run on disk is whole or passed over; a full disk takes nothing that was there."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sortserve.engine.errors import SortingError
from sortserve.sorting import saved_run
from sortserve.sorting.saved_run import SavedRun, load_newest, save


def run(update: int, value: float | None = None, size: int = 1000) -> SavedRun:
    return SavedRun({"weight/a": torch.full((size,), float(update if value is None else value))}, {"update": update})


@contextmanager
def no_room_beyond(num_bytes: int) -> Iterator[None]:
    """Files of this process cannot grow further: the write fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def newest(folder: Path) -> int:
    found = load_newest(folder)
    assert found is not None
    update = int(found.facts["update"])
    assert torch.equal(found.tensors["weight/a"], torch.full((1000,), float(update)))
    return update


def test_the_newest_is_taken_and_two_are_kept(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    for update in (5, 10, 15):
        save(tmp_path, run(update))
    assert newest(tmp_path) == 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update-000000010", "update-000000015"]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_truncated_one_is_passed_over(
    tmp_path: Path, file: str, keep: float, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, run(5))
    save(tmp_path, run(10))
    path = tmp_path / "update-000000010" / file
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    assert newest(tmp_path) == 5
    assert "update-000000010" in capsys.readouterr().err


def test_a_changed_value_is_seen(tmp_path: Path) -> None:
    save(tmp_path, run(5))
    path = tmp_path / "update-000000005/state.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(SortingError, match=r"state\.safetensors.*hash.*--fresh"):
        load_newest(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(tmp_path: Path, value: float) -> None:
    save(tmp_path, run(5, value))
    with pytest.raises(SortingError, match="weight/a holds NaN or infinity"):
        load_newest(tmp_path)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    save(tmp_path, run(5))
    save(tmp_path, run(10))
    for room in (0, 100, 3000):
        with pytest.raises(OSError, match=r"."), no_room_beyond(room):
            save(tmp_path, run(15))
        assert newest(tmp_path) == 10
        assert len(list(tmp_path.iterdir())) == 2, "the half-written one is removed"
    save(tmp_path, run(15))
    assert newest(tmp_path) == 15


def test_a_kill_in_the_middle_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves is neither read nor in the way."""
    save(tmp_path, run(5))

    def killed(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file(tensors, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saved_run, "save_file", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, run(10))
    assert newest(tmp_path) == 5
    save(tmp_path, run(10))
    assert newest(tmp_path) == 10
