"""Cost models of GPUs, by hand."""

import numpy as np
import pytest

from sortserve.engine.cost import StepShape
from sortserve.engine.simulator.capacity import closed_loop_rate
from sortserve.engine.simulator.hardware import device_of, replica_config, unloaded
from sortserve.engine.simulator.traces import Trace

LAYER_PARAMETERS = 4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336  # of Llama-3.1-8B
HEAD_PARAMETERS = 4096 * 128256


def _shape(rows: float, context: float = 0.0, pairs: float = 0.0) -> StepShape:
    config = replica_config("llama-3.1-8b", "h200")
    share = config.rungs.share[-1]
    ones = np.ones(len(share))
    return StepShape(ones * rows, share * rows, share, ones * context, ones * pairs, np.asarray(1.0))


def test_a_lone_row_reads_the_weights_and_its_context() -> None:
    config = replica_config("llama-3.1-8b", "h200")
    read = 4.8e12 * 0.8
    by_hand = 2 * (32 * LAYER_PARAMETERS + HEAD_PARAMETERS) / read + 32 * 10e-6 + 300e-6
    assert config.cost.seconds(_shape(1)) == pytest.approx(by_hand)
    more = config.cost.seconds(_shape(1, context=1000)) - config.cost.seconds(_shape(1))
    assert more == pytest.approx(32 * 1000 * 4096 / read)


def test_a_full_chunk_computes() -> None:
    config = replica_config("llama-3.1-8b", "h200")
    by_hand = 2048 * 2 * 32 * LAYER_PARAMETERS / (989.4e12 * 0.65) + 2 * HEAD_PARAMETERS / (4.8e12 * 0.8)
    assert config.cost.seconds(_shape(2048)) == pytest.approx(by_hand + 32 * 10e-6 + 300e-6)
    pairs = config.cost.seconds(_shape(2048, pairs=1e6)) - config.cost.seconds(_shape(2048))
    assert pairs == pytest.approx(32 * 1e6 * 4 * 4096 / (989.4e12 * 0.5))


def test_the_ladder_is_sorted_llamas() -> None:
    rungs = replica_config("llama-3.1-8b", "h200").rungs
    assert np.cumsum(rungs.layers).tolist() == [10, 13, 16, 19, 22, 26, 29, 32]
    assert rungs.quality[[0, 2, 5, 7]] == pytest.approx([0.203 / 0.941, 0.521 / 0.941, 0.885 / 0.941, 1.0])
    assert rungs.default_floor == 2, "the first of half the full score"


def test_memory_and_what_does_not_fit() -> None:
    config = replica_config("llama-3.1-70b", "h200x4")
    weights = 2 * (80 * (8192 * 128 * (2 * 64 + 2 * 8) + 3 * 8192 * 28672) + 2 * 8192 * 128256)
    assert config.kv.capacity == pytest.approx(4 * 141e9 * 0.9 - weights)
    with pytest.raises(ValueError, match="141 GB of weights do not fit into h100"):
        replica_config("llama-3.1-70b", "h100")
    with pytest.raises(ValueError, match="no device 'a100'; there are: h100, h200"):
        device_of("a100")
    with pytest.raises(ValueError, match="no model 'gpt'"):
        replica_config("gpt", "h200")


def test_four_gpus_are_faster_than_one_but_not_four_times() -> None:
    one, four = (replica_config("llama-3.1-8b", name).cost.seconds(_shape(1)) for name in ("h200", "h200x4"))
    assert 1.5 < one / four < 4
    weights = 2 * (32 * LAYER_PARAMETERS + HEAD_PARAMETERS) / (4 * 4.8e12 * 0.8)
    reduced = 8e-6 + 2 * 3 / 4 * 4096 * 2 / (450e9 * 0.7)  # one of two in each layer
    assert four == pytest.approx(weights + 32 * (10e-6 + 2 * reduced) + 300e-6)


def test_capacity_lies_below_the_time_of_the_work_alone() -> None:
    """512 tokens in and 32 out: the work at the best rates, and little more is lost to steps that are not full."""
    config = replica_config("llama-3.1-8b", "h200")
    trace = Trace(np.arange(10.0), np.full(10, 512), np.full(10, 32))
    rate = closed_loop_rate(config, trace, config.rungs.full, 600)
    least = 544 * 2 * 32 * LAYER_PARAMETERS / (989.4e12 * 0.65)
    assert 0.6 / least < rate < 1 / least
    alone = unloaded(config)
    assert alone.token == pytest.approx(float(config.cost.seconds(_shape(1, context=1024))))
    assert alone.ttft(np.array([1500]))[0] == pytest.approx(
        float(config.cost.seconds(_shape(1500, 1500, 1500**2 / 2))), rel=0.15
    )
