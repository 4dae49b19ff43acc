"""`--weights int8`: what the engine tells, what it costs, prefixes, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sortserve.engine import engine as engine_module
from sortserve.engine import settling
from sortserve.engine.config import EngineConfig
from sortserve.engine.engine import Engine
from sortserve.engine.errors import StartupError
from sortserve.engine.runner import Runner
from sortserve.kernels.ffn import StaircaseFfn, plan_rows
from sortserve.kernels.linear_int8 import is_exact
from tests.engine.tiny_models import make_tiny

needs_int8 = pytest.mark.skipif(not is_exact(), reason="no exact int8 products here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "model"
    make_tiny(folder, "llama", seed=3)
    return folder


def load(folder: Path, weights: str, **settings: Any) -> Engine:
    config = EngineConfig(folder, dtype="float32", weights=weights, kv_bytes=8 << 20, warmup=False, **settings)
    return Engine.load(config)


@needs_int8
def test_format_and_bytes_are_told(folder: Path) -> None:
    plain, int8 = load(folder, "auto").info, load(folder, "int8").info
    assert (plain.weights, int8.weights) == ("float32", "int8")
    assert plain.ladder.costs[-1].weight_bytes == 4 * int8.ladder.costs[-1].weight_bytes
    assert [entry.submodel for entry in plain.ladder.entries] == [entry.submodel for entry in int8.ladder.entries]
    assert int8.weight_bytes < 0.6 * plain.weight_bytes  # tiny: the embedding and four numbers a channel count
    assert int8.ladder.shape.kv_bytes_per_token_layer == plain.ladder.shape.kv_bytes_per_token_layer


@needs_int8
def test_a_share_of_the_layers_is_the_least_important_ones(folder: Path, tmp_path: Path) -> None:
    """By the ladder's own figures; the head stays as it is, costs follow, and times are kept apart by layer."""
    plain = load(folder, "auto")
    shape, path = plain.info.ladder.shape, tmp_path / "ladder.json"
    importance = [-0.1 * number for number in range(shape.num_layers)]  # the last ones matter least
    replace(plain.info.ladder, layer_importance=tuple(importance)).dump(path)
    half = load(folder, "int8", weights_share=0.5, ladder_path=path)
    last = frozenset(range(shape.num_layers // 2, shape.num_layers))
    assert half.info.ladder.shape.narrow_layers == last
    assert half.info.weights == f"int8 in {len(last)} of {shape.num_layers} layers, float32"
    everything, saved = plain.info.ladder.costs[-1].weight_bytes, 0.75 * 4 * len(last) * shape.layer_parameters
    assert half.info.ladder.costs[-1].weight_bytes == everything - saved
    assert isinstance(half.runner, Runner)
    sizes = [layer.nbytes for layer in half.runner._model.weights.layers]
    assert [number for number, size in enumerate(sizes) if size < 0.5 * max(sizes)] == sorted(last)


def test_a_share_needs_to_know_the_layers(folder: Path) -> None:
    with pytest.raises(StartupError, match="ladder measure") as caught:
        load(folder, "int8", weights_share=0.5)
    assert caught.value.param == "weights_share"
    for weights, share in (("auto", 0.5), ("int8", 0.0), ("int8", 1.5)):
        with pytest.raises(StartupError, match="weights_share"):
            load(folder, weights, weights_share=share)


@needs_int8
def test_measured_times_are_kept_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []

    def noting(about: dict[str, str], *_: object, use_cache: bool) -> None:
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
    monkeypatch.setattr(settling, "is_exact", lambda: False)
    with pytest.raises(StartupError, match=way_out) as caught:
        load(folder, weights)
    assert caught.value.param == "weights"
