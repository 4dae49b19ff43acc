"""`--weights int8`: what the engine tells, what it costs, prefixes, and what is refused."""

from pathlib import Path

import pytest
import torch

from sortserve.engine import engine as engine_module
from sortserve.engine.config import EngineConfig
from sortserve.engine.engine import Engine
from sortserve.engine.errors import StartupError
from sortserve.kernels.ffn import StaircaseFfn, plan_rows
from sortserve.kernels.linear_int8 import is_exact
from tests.engine.tiny_models import make_tiny

needs_int8 = pytest.mark.skipif(not is_exact(), reason="no exact int8 products here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "model"
    make_tiny(folder, "llama", seed=3)
    return folder


def load(folder: Path, weights: str) -> Engine:
    return Engine.load(EngineConfig(folder, dtype="float32", weights=weights, kv_bytes=8 << 20, warmup=False))


@needs_int8
def test_format_and_bytes_are_told(folder: Path) -> None:
    plain, int8 = load(folder, "auto").info, load(folder, "int8").info
    assert (plain.weights, int8.weights) == ("float32", "int8")
    assert plain.ladder.costs[-1].weight_bytes == 4 * int8.ladder.costs[-1].weight_bytes
    assert [entry.submodel for entry in plain.ladder.entries] == [entry.submodel for entry in int8.ladder.entries]
    assert int8.weight_bytes < 0.6 * plain.weight_bytes  # tiny: the embedding and four numbers a channel count
    assert int8.ladder.shape.kv_bytes_per_token_layer == plain.ladder.shape.kv_bytes_per_token_layer


@needs_int8
def test_measured_times_are_kept_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []

    def noting(about: dict[str, str], measure: object, *, use_cache: bool) -> None:
        keys.append(about)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_module, "fitted", noting)
    for weights in ("auto", "int8"):
        engine = load(folder, weights)
        with pytest.raises(KeyboardInterrupt):
            engine.measure()
    assert keys[0] != keys[1]


@needs_int8
def test_a_width_has_the_same_weights_wherever_blocks_end() -> None:
    """Scales are those of the whole matrix; a matrix that is cut first has others."""
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(*size, generator=generator) for size in ((64, 48), (64, 48), (48, 64)))
    down[:, 40] = 30.0  # what lies beyond the width sets the scale all the same
    x = torch.randn(3, 48, generator=generator)
    outs = []
    for boundaries in ((64,), (16, 32, 64), (32, 48, 64)):
        ffn = StaircaseFfn(gate, up, down, boundaries, int8=True)
        outs.append(ffn.add_to(torch.zeros(3, 48), x, plan_rows([32, 32, 17], boundaries, torch.float32)))
    assert (outs[0] - outs[1]).norm() < 1e-5 * outs[0].norm()
    assert (outs[0] - outs[2]).norm() < 1e-5 * outs[0].norm()
    cut = StaircaseFfn(gate[:32], up[:32], down[:, :32], (32,), int8=True)
    own = cut.add_to(torch.zeros(3, 48), x, plan_rows([32, 32, 17], (32,), torch.float32))
    assert (outs[0] - own).norm() > 1e-3 * outs[0].norm()


@pytest.mark.parametrize(
    ("weights", "way_out"), [("fp8", "use --weights int8"), ("int8", "start without"), ("int4", "must be one of")]
)
def test_formats_that_cannot_run_are_refused(
    folder: Path, weights: str, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "is_exact", lambda: False)
    with pytest.raises(StartupError, match=way_out) as caught:
        load(folder, weights)
    assert caught.value.param == "weights"
