"""As-if, per token, on the runner for CUDA devices: padded calls as its graphs make them, and unpadded ones.

Long schedules run on torch's stand-ins for the kernels, a few short ones on the Triton kernels in the interpreter.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sortserve.engine.cuda import attention, forward, rows
from sortserve.engine.cuda.buffers import StepBuffers
from sortserve.engine.cuda.rows import RowLayout, StepRows
from sortserve.engine.cuda.runner import CudaOptions, CudaRunner
from sortserve.engine.cuda.tables import Longs, PageTables
from sortserve.engine.model_config import load_model_config
from sortserve.engine.plan import Ints
from sortserve.kernels.gpu import backends, flash_attention
from sortserve.kernels.gpu.backends import OURS, Offer
from sortserve.kernels.products import Products
from tests.engine import asif
from tests.engine.asif import random_run
from tests.engine.cuda import plain_kernels
from tests.engine.cuda.harness import EAGER, PADDED, CudaHarness, make_model
from tests.kernels.gpu.flash_attention_model import with_cache
from tests.kernels.gpu.interpreter import round_fp8_rightly

pytestmark = pytest.mark.usefixtures("one_thread")

MUST_HAPPEN = (
    "planned ahead",
    "surplus row",
    "partial refill",
    "depth change inside a prompt",
    "refill and decode in one segment call",
    "shared block deepened",
    "release then promote",
    "preempted",
    "prefix hit on a mixed-width chain refused",
    "prefix hit",
    "states adopted",
    "refill from a state",
    "refill from layer 0",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("cuda") / "model")


def run_one(
    folder: Path,
    seed: int,
    options: CudaOptions,
    num_actions: int = 80,
    *,
    int8: bool = False,
    narrow: frozenset[int] | None = None,
    fp8_kv: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Counter[str]:
    rng = random.Random(seed)
    harness = CudaHarness(
        folder,
        num_pages=rng.choice([30, 80]),
        max_step_tokens=rng.choice([3, 7, 20]),
        options=options,
        products=Products(int8),
        narrow=narrow,
        fp8_kv=fp8_kv,
        dtype=dtype,
        ahead=seed % 2 == 0,
        stops=tuple(range(0, 101, 17)),
    )
    random_run(harness, rng, num_actions=num_actions)
    return harness.seen


def test_random_schedules_are_as_if(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of padding come from whatever the buffers held; kernels' stand-ins give NaN for what nobody may read. Half of the
    schedules are padded and half are not, half of each planned ahead."""
    plain_kernels.put_in_place(monkeypatch, forward)
    seen: Counter[str] = Counter()
    for seed in range(8):
        seen.update(run_one(folder, seed, PADDED if seed % 4 < 2 else EAGER))
    missing = [name for name in MUST_HAPPEN if seen[name] == 0]
    assert not missing, f"never happened: {missing}; {dict(seen)}"


@pytest.mark.parametrize("special", [False, True], ids=["padded", "eager-fp8-window"])
def test_the_triton_kernels_are_as_if(
    folder: Path, special: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same through the kernels themselves, a few steps: what fits where they meet the runner. Two depths and widths
    together, then one of them goes deeper from kept states; single rows in padded calls, and tiles of several over fp8 K/V
    with a window. A false alarm with fp8: one of 4,000 K and V rounded the other way than the oracle's, which at 3e-7 of its
    size happens to one of 100 seeds, and to this one everywhere or nowhere."""
    round_fp8_rightly(monkeypatch)
    if special:
        folder = make_model(tmp_path / "windowed", "mistral", sliding_window=3)
    options = EAGER if special else PADDED
    harness = CudaHarness(folder, num_pages=80, max_step_tokens=20, options=options, fp8_kv=special)
    place = harness.ladder.place
    moved = harness.submit([5, 6, 7], 3, place=place("d1-x48"), exact=False)
    harness.submit([8, 9], 2, place=harness.ladder.full, exact=False)
    harness.ahead = True
    harness.checked_step()
    harness.policy.wanted[moved] = place("d3-x48")
    harness.finish()
    assert harness.seen["refill from a state"] > 0, dict(harness.seen)


def test_int8_weights_are_as_if(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle computes with the weights that the int8 ones stand for, in all layers and in some."""
    plain_kernels.put_in_place(monkeypatch, forward)
    for narrow in (None, frozenset({1, 2, 4})):
        run_one(folder, 1, PADDED, num_actions=30, int8=True, narrow=narrow)


def test_fp8_kv_is_as_if(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle attends to K and V rounded to e4m3, of every token, however often it was refilled. States lie in pages of
    the same bytes, in their own dtype: float64, so that what lies between two numbers of e4m3 goes the same way in both."""
    plain_kernels.put_in_place(monkeypatch, forward)
    seen: Counter[str] = Counter()
    for seed in range(2):
        seen.update(run_one(folder, seed, PADDED, num_actions=60, fp8_kv=True, dtype=torch.float64))
    assert seen["refill from a state"] > 0, dict(seen)
    assert seen["prefix hit"] > 0, dict(seen)


def test_fp8_kv_that_is_not_rounded_is_caught(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle over K and V as they were computed is too far off: rounding them is what the test above sees."""
    plain_kernels.put_in_place(monkeypatch, forward)
    monkeypatch.setattr(asif, "e4m3", lambda x: x)
    with pytest.raises(AssertionError, match="relative error"):
        run_one(folder, 0, PADDED, num_actions=40, fp8_kv=True, dtype=torch.float64)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_sliding_window_is_as_if(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same window in all layers, as config.json of the family says it; tests/engine/test_families.py holds the CPU's to
    transformers'. One token too many is found."""
    plain_kernels.put_in_place(monkeypatch, forward)
    settings = {"use_sliding_window": True, "max_window_layers": 0} if family == "qwen2" else {}
    folder = make_model(tmp_path / "model", family, sliding_window=7, **settings)
    assert load_model_config(folder).sliding_window == 7
    run_one(folder, 3, EAGER, num_actions=40)
    attend = plain_kernels.paged_attention

    def wider(query: Tensor, pool: Tensor, batch: Any, layer: Any, **options: Any) -> Any:
        return attend(query, pool, batch, replace(layer, window=layer.window + 1), **options)

    monkeypatch.setattr(backends, "paged_attention", wider)
    with pytest.raises(AssertionError, match="relative error"):
        run_one(folder, 3, EAGER, num_actions=40)


def test_a_library_that_is_faster_is_as_if(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """FlashAttention behind the runner's call, for single rows and chunks, skipped layers and padding: a model of it, which
    the measurement at start finds the fastest. The pool is as empty afterwards as it was."""
    plain_kernels.put_in_place(monkeypatch, forward)
    asked = Counter[str]()

    def library(query: Tensor, *arguments: Any, **options: Any) -> Tensor:
        asked["chunk" if "cu_seqlens_q" in options else "single"] += 1
        return with_cache(query, *arguments, **options)

    ours: Any = plain_kernels.paged_attention
    theirs = flash_attention.on_our_pages(library)
    monkeypatch.setattr(attention, "offers", lambda *_: (Offer(OURS, ours), Offer("flash", theirs)))
    times = iter([2.0, 1.0, 3.0, 0.5])
    monkeypatch.setattr(backends, "_graph_milliseconds", lambda call: next(times))
    with caplog.at_level("INFO"):
        harness = CudaHarness(folder, num_pages=80, max_step_tokens=20, options=EAGER)
    runner = harness.runner
    assert isinstance(runner, CudaRunner)
    assert runner.attention.words == "attention by flash"
    assert "attention of chunks by flash (triton: 3.0000 ms, flash 0.5000)" in caplog.text
    assert not runner._eager.pool.any()
    asked.clear()
    random_run(harness, random.Random(3), num_actions=40)
    assert asked["chunk"] > 20
    assert asked["single"] > 20


# ---- planted bugs: each must be caught


def _padding_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding rows have a slot: they write the K/V of a page that is somebody's."""
    clear = StepBuffers.clear

    def planted(self: StepBuffers) -> None:
        clear(self)
        self.host["slots"].fill(0)

    monkeypatch.setattr(StepBuffers, "clear", planted)


def _stale_page_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence's pages are sent once."""
    changed = PageTables._changed

    def planted(self: PageTables, seat: int, pages: Ints) -> Longs:
        known = self.mirror[:, seat, : len(pages)].T
        return changed(self, seat, np.where(known > 0, known, pages))

    monkeypatch.setattr(PageTables, "_changed", planted)


def _width_of_the_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row has the widths of the row before it."""
    fill = RowLayout.fill

    def planted(self, host, *rest):  # type: ignore[no-untyped-def]
        counts = fill(self, host, *rest)
        host["width"][:] = np.roll(host["width"], 1, axis=1)
        return counts

    monkeypatch.setattr(RowLayout, "fill", planted)


def _leavers_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit buffer's rows are numbered one too far where a row leaves early."""

    def planted(self: StepRows) -> Longs:
        result: Longs = np.cumsum(self.wanted) - 1 + (self.exit.max() - self.exit).astype(np.int64) % 2
        return result

    monkeypatch.setattr(StepRows, "exit_number", property(planted))


def _states_of_another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept states are read one piece off."""
    entering = RowLayout._entering

    def planted(self, host, step):  # type: ignore[no-untyped-def]
        count = entering(self, host, step)
        host["state_read"][: count * self.state_pieces] += 1
        return count

    monkeypatch.setattr(RowLayout, "_entering", planted)


def _tiles_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row of a long tile is left out."""
    tiles = rows._tiles

    def planted(host, segment, run, tile_rows):  # type: ignore[no-untyped-def]
        count = tiles(host, segment, run, tile_rows)
        lengths = host["tile_rows"][segment, :count]
        lengths[lengths > 2] -= 1
        return count

    monkeypatch.setattr(rows, "_tiles", planted)


def _token_of_a_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose token is still on the device take that of another one."""
    find_late = CudaRunner._find_late

    def planted(self, buffers, step):  # type: ignore[no-untyped-def]
        count = find_late(self, buffers, step)
        buffers.host["late_from"][:count] = np.roll(buffers.host["late_from"][:count], 1)
        return count

    monkeypatch.setattr(CudaRunner, "_find_late", planted)


PLANTED: dict[str, tuple[CudaOptions, Callable[[pytest.MonkeyPatch], None]]] = {
    "padding rows write K/V": (PADDED, _padding_writes),
    "stale page table": (PADDED, _stale_page_table),
    "width of the neighbour": (PADDED, _width_of_the_neighbour),
    "leavers lost": (PADDED, _leavers_lost),
    "states of another row": (PADDED, _states_of_another_row),
    "tiles too short": (EAGER, _tiles_too_short),
    "token of a neighbour": (PADDED, _token_of_a_neighbour),
}


def run_some(folder: Path, options: CudaOptions) -> None:
    for seed in range(8):
        run_one(folder, seed, options)


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(bug: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, plant = PLANTED[bug]
    plain_kernels.put_in_place(monkeypatch, forward)
    plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        run_some(folder, options)


def test_a_step_that_is_too_long_for_graphs_runs_unpadded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of 20 rows of one sequence takes tiles; the single rows after it take the padded calls."""
    plain_kernels.put_in_place(monkeypatch, forward)
    harness = CudaHarness(folder, num_pages=80, max_step_tokens=20, options=PADDED)
    runner = harness.runner
    assert isinstance(runner, CudaRunner)
    assert runner.graphs is not None
    padded = list[int]()
    segment = runner.graphs.segment

    def noting(number: int, count: int) -> None:
        padded.append(count)
        segment(number, count)

    monkeypatch.setattr(runner.graphs, "segment", noting)
    harness.submit(list(range(1, 21)), 3, place=harness.ladder.full, exact=False)
    harness.checked_step()
    assert padded == []
    harness.finish()
    assert padded == [1] * (2 * harness.geometry.num_segments)
