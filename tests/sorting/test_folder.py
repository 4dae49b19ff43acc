"""Folders and files are written whole or not at all: real full disks (a file size limit) and real failures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sortserve.engine.errors import SortingError
from sortserve.engine.model_config import load_model_config
from sortserve.sorting.folder import check_target, new_file, new_folder
from sortserve.sorting.permute import write_permuted

FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from sortserve.engine.model_config import load_model_config
from sortserve.engine.errors import SortingError
from sortserve.sorting.folder import new_file, new_folder
from sortserve.sorting.permute import write_permuted

model, wanted = Path(sys.argv[1]), Path(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit is an error, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
config = load_model_config(model)
orders = [torch.arange(config.shape.ffn_width)] * config.shape.num_layers
for name, write in (("folder", new_folder), ("file", new_file)):
    try:
        with write(wanted / name, **({"replace": True} if name == "folder" else {})) as path:
            if name == "folder":
                write_permuted(model, path, config, orders)
            else:
                path.write_bytes(bytes(200_000))
    except SortingError as error:
        print(error.message)
"""


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_full_disk_loses_nothing(tmp_path: Path, toy_folder: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").write_text("the old weights")
    (tmp_path / "file").write_text("the old ladder")
    before = files(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    ended = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(toy_folder), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    folder, file = ended.stdout.splitlines()
    assert "File too large" in folder
    assert "File too large" in file
    assert "nothing was changed" in folder
    assert files(tmp_path) == before, "the old files, and nothing beside them"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_a_failure_on_the_way_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    wanted = tmp_path / "model"
    wanted.mkdir()
    (wanted / "old").write_text("old")
    expected = SortingError if isinstance(error, OSError) else type(error)

    def write_a_folder() -> None:
        with new_folder(wanted, replace=True) as folder:
            (folder / "new").write_text("half")
            raise error

    def write_a_file() -> None:
        with new_file(wanted / "old") as path:
            path.write_text("half")
            raise error

    for write in (write_a_folder, write_a_file):
        with pytest.raises(expected):
            write()
    assert files(tmp_path) == {"model/old": b"old"}


def test_a_finished_folder_takes_the_name(tmp_path: Path) -> None:
    for number in range(2):
        with new_folder(tmp_path / "model", replace=True) as folder:
            (folder / f"file{number}").write_text("x")
        assert files(tmp_path) == {f"model/file{number}": b"x"}
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
    with new_file(tmp_path / "ladder.json") as path:
        path.write_text("{}")
    assert (tmp_path / "ladder.json").read_text() == "{}"


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    check_target(tmp_path / "model")  # empty: fine
    (tmp_path / "model" / "old").touch()
    with pytest.raises(SortingError, match="not empty"):
        check_target(tmp_path / "model")
    with pytest.raises(SortingError, match="no folder"):
        check_target(tmp_path / "nowhere" / "model")
    with pytest.raises(SortingError, match="are free"):
        check_target(tmp_path / "new", 1 << 60)


def test_permuted_folders_have_the_same_tensors_in_another_order(tmp_path: Path) -> None:
    from tests.engine.tiny_models import make_tiny

    source, out = tmp_path / "source", tmp_path / "out"
    make_tiny(source, "llama", shards=3, mlp_bias=True)
    (source / "ladder.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("old")
    (source / "LICENSE").write_text("words")
    config = load_model_config(source)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(64, generator=generator) for _ in range(6)]
    out.mkdir()
    write_permuted(source, out, config, orders)
    names = {path.name for path in source.iterdir()} - {"ladder.json", "pytorch_model.bin"}
    assert {path.name for path in out.iterdir()} == names
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    for path in source.glob("*.safetensors"):
        before, after = load_file(path), load_file(out / path.name)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            order = orders[int(name.split(".")[2])] if ".mlp." in name else None
            if order is None or name.endswith("down_proj.bias"):
                expected = tensor
            else:
                expected = tensor[:, order] if "down_proj" in name else tensor[order]
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], expected), name
