"""Width blocks over tensor-parallel ranks: the shards of each block add up to it, for every width; and two real ranks."""

import json
import os
import subprocess
import sys

import pytest
import torch

from sortserve.engine.vllm.model.rows import block_rows
from tests.bundled import ABOVE_MIDDLE, FLOOR, FULL, MIDDLE
from tests.vllm.conftest import BUNDLED
from tests.vllm.engines import Engine
from tests.vllm.test_asif import prompts

WIDTHS = [64, 0, 40, 16, 8, 64]
TOKENS = [1, 2, 1, 3, 1, 1]
BOUNDARIES = (16, 32, 64)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_of_the_blocks_add_up_to_each_rows_width(
    ranks: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks one after the other, their sums added up here, against the formula in float64."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers import linear

    from sortserve.engine.vllm.model import blocks
    from sortserve.kernels.ffn import reference

    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(shape, generator=generator) for shape in ((64, 24), (64, 24), (24, 64)))
    x = torch.randn(sum(TOKENS), 24, generator=generator)
    rows = block_rows(WIDTHS, TOKENS, BOUNDARIES, torch.device("cpu"))
    total = torch.zeros_like(x)
    for rank in range(ranks):
        for module in (blocks, linear):
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        monkeypatch.setattr(blocks, "all_reduce", lambda part: part)
        with set_current_vllm_config(engine.llm.llm_engine.vllm_config):
            mlp = blocks.BlockMLP(24, BOUNDARIES, bias=False, down_bias=False, prefix=f"test{rank}")
        for name, tensor, shard in (("gate_up_proj", gate, 0), ("gate_up_proj", up, 1), ("down_proj", down, None)):
            given = tensor.clone()
            given.shard_id = shard  # type: ignore[attr-defined]
            mlp.load_weights([(f"{name}.weight", given)])
        for part in (*mlp.gate_up, *mlp.down):
            part.quant_method.process_weights_after_loading(part)
        total += mlp(x, rows)
    widths = [width for width, number in zip(WIDTHS, TOKENS, strict=True) for _ in range(number)]
    expected = reference(x, gate, up, down, widths)
    assert (total.double() - expected).norm() / expected.norm() < 1e-5


def test_a_block_that_the_ranks_cannot_share_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from sortserve.engine.errors import StartupError
    from sortserve.engine.vllm.model import blocks

    monkeypatch.setattr(blocks, "get_tensor_model_parallel_world_size", lambda: 4)
    with pytest.raises(StartupError, match=r"neurons \[0, 18\) .* 4 tensor-parallel ranks"):
        blocks.BlockMLP(24, (18, 64), bias=False, down_bias=False, prefix="test")


@pytest.mark.slow
def test_two_ranks_say_what_one_says(engine: Engine) -> None:
    """Two processes with half of each block, over gloo."""
    asked = prompts(engine, (5, 33, 70, 40))
    # the bundled ladder: a width of the other one, inside a block, cannot be halved
    ids = [FLOOR, MIDDLE, ABOVE_MIDDLE, FULL]
    places = [engine.ladder.place(submodel) for submodel in ids]
    expected = [engine.alone(prompt, place, 8) for prompt, place in zip(asked, places, strict=True)]
    ladder = BUNDLED / "ladder.json"
    given = json.dumps({"model": str(BUNDLED), "ladder": str(ladder), "prompts": asked, "submodels": ids})
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.two_ranks"],
        input=given,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"},
        cwd=BUNDLED.parent.parent.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
