"""Compiling: what is kept, what is refused, and that nothing of it stops a start."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from sortserve.kernels import compiling
from sortserve.kernels.compiling import UnavailableError, library
from sortserve.kernels.products import Products, choose_products


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small source, compiled into an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "_processor_flags", lambda: [])
    path = tmp_path / "small.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


@pytest.fixture
def compiled(source: Path) -> Path:
    """The same, after a start with a compiler; the file that was kept."""
    try:
        assert library(source).answer() == 42
    except UnavailableError as error:
        pytest.skip(str(error))
    [kept] = (compiling.cache_folder() / "kernels").iterdir()
    return kept


def test_what_was_compiled_needs_no_compiler(compiled: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert library(source).answer() == 42
    source.write_text('extern "C" int answer() { return 43; }\n')
    with pytest.raises(UnavailableError, match="nowhere"):
        library(source)


def test_a_changed_source_is_compiled_anew(compiled: Path, source: Path) -> None:
    source.write_text('extern "C" int answer() { return 43; }\n')
    assert library(source).answer() == 43
    assert len(list(compiled.parent.iterdir())) == 2, "nothing else is left there"


def test_a_changed_header_is_compiled_anew(compiled: Path, source: Path) -> None:
    source.with_name("more.h").write_text("#pragma once\n")
    assert library(source).answer() == 42
    assert len(list(compiled.parent.iterdir())) == 2


@pytest.mark.parametrize("part", ["file", "folder"])
def test_what_others_could_have_written_is_not_loaded(compiled: Path, source: Path, part: str) -> None:
    (compiled if part == "file" else compiled.parent).chmod(0o777)
    with pytest.raises(UnavailableError, match="written by others"):
        library(source)


def test_a_broken_file_in_the_cache_is_told(compiled: Path, source: Path) -> None:
    """A new file: the loaded one stays mapped."""
    compiled.unlink()
    compiled.write_bytes(b"no library")
    with pytest.raises(UnavailableError, match="OSError"):
        library(source)


def test_a_cache_that_cannot_be_written_costs_a_compilation(
    compiled: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "no folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no folder"))
    with caplog.at_level("INFO"):
        assert library(source).answer() == 42
    assert "kept in nowhere" in caplog.text


@pytest.mark.parametrize(
    ("text", "compiler", "reason"),
    [
        ("int answer() { return 42 }", None, "error: expected"),
        ("", "/bin/false", "failed"),
        ("", "/nowhere/g++", "FileNotFoundError"),
    ],
    ids=["source", "compiler", "none"],
)
def test_reasons(source: Path, monkeypatch: pytest.MonkeyPatch, text: str, compiler: str | None, reason: str) -> None:
    source.write_text(text)
    if compiler is not None:
        monkeypatch.setenv("CXX", compiler)
    elif not any(shutil.which(name) for name in compiling.COMPILERS):
        pytest.skip("no compiler")
    with pytest.raises(UnavailableError, match=reason):
        library(source)


def test_no_compiler_and_too_old_a_processor(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(source.parent))
    with pytest.raises(UnavailableError, match=r"no C\+\+ compiler"):
        library(source)
    monkeypatch.undo()
    monkeypatch.setattr(compiling, "NEEDED", {"avx1024": "-mavx1024"})
    with pytest.raises(UnavailableError, match=r"avx1024|Linux"):
        compiling._processor_flags()


def test_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be compiled is replaced by oneDNN's products, with a reason; other formats never ask."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/nowhere/g++")
    chosen = choose_products(torch.bfloat16, int8=False)
    assert chosen.native is None
    assert "nowhere" in chosen.reason or "made for" in chosen.reason or "processor" in chosen.reason
    assert chosen.name in ("oneDNN", "PyTorch")
    for dtype, int8, compile in (
        (torch.float32, False, True),
        (torch.float16, True, True),
        (torch.bfloat16, False, False),
    ):
        assert choose_products(dtype, int8=int8, compile=compile) == Products(int8)
    assert os.listdir(tmp_path) == []
