"""Widths over tensor-parallel ranks: the ranks' prefixes add up to each row's width; and two real ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.bundled import FLOOR, FULL
from tests.vllm.conftest import BUNDLED
from tests.vllm.engines import Engine
from tests.vllm.test_asif import prompts

WIDTHS = [64, 64, 64, 0, 41, 16, 16, 16, 7, 1, 64]  # of the rows
BOUNDARIES = (1, 16, 33, 64)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sort", [False, True])
def test_shards_add_up_to_each_rows_width(
    ranks: int, dtype: torch.dtype, sort: bool, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks one after the other, their sums added up here, against the formula in float64. Biases too."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers import linear
    from vllm.model_executor.models.llama import LlamaMLP

    from sortserve.engine.vllm.model import widths
    from sortserve.engine.weights import importance_order
    from sortserve.kernels.ffn import plan_rows, reference
    from sortserve.kernels.products import choose_products

    generator = torch.Generator().manual_seed(0)
    given = {
        ("gate_up_proj.weight", 0): torch.randn(64, 24, generator=generator),
        ("gate_up_proj.weight", 1): torch.randn(64, 24, generator=generator),
        ("down_proj.bias", None): torch.randn(24, generator=generator),
        ("down_proj.weight", None): torch.randn(24, 64, generator=generator),
        ("gate_up_proj.bias", 0): torch.randn(64, generator=generator),
        ("gate_up_proj.bias", 1): torch.randn(64, generator=generator),
    }
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    x = torch.randn(len(WIDTHS), 24, generator=generator).to(dtype)
    total = torch.zeros_like(x, dtype=torch.float32)
    for rank in range(ranks):
        for module in (widths, linear):
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        monkeypatch.setattr(widths, "all_reduce", lambda part: part)
        with set_current_vllm_config(engine.llm.llm_engine.vllm_config):
            torch.set_default_dtype(dtype)
            try:
                stock = LlamaMLP(24, 64, "silu", bias=True, prefix=f"test{rank}")
            finally:
                torch.set_default_dtype(torch.float32)
            mlp = widths.WidthMLP(stock, BOUNDARIES, choose_products(dtype, int8=False), sort=sort)
        for (name, shard), tensor in given.items():
            tensor = tensor.clone()
            if shard is not None:
                tensor.shard_id = shard  # type: ignore[attr-defined]
            mlp.load_weights([(name, tensor)])
        for part in (mlp.gate_up_proj, mlp.down_proj):
            part.quant_method.process_weights_after_loading(part)
        total += mlp(x, plan_rows([mlp.shard.own(width) for width in WIDTHS], mlp.shard.boundaries, dtype)).float()
    gate, up, bias, down, *biases = given.values()
    gate, up = (torch.cat([weight, own[:, None]], 1) for weight, own in zip((gate, up), biases, strict=True))
    order = importance_order(down) if sort else torch.arange(64)
    with_one = torch.cat([x, torch.ones(len(x), 1, dtype=dtype)], 1)
    expected = reference(with_one, gate[order], up[order], down[:, order], WIDTHS)
    expected += bias.double() * (torch.tensor(WIDTHS) > 0)[:, None]
    assert (total.double() - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("clean")
def test_two_ranks_say_what_one_says(engine: Engine, ladder_path: Path) -> None:
    """Two processes with half of the neurons each, over gloo; also of widths that two do not divide evenly, and of requests
    that go deeper and shallower."""
    asked = prompts(engine, (5, 33, 70, 40, 52, 54))
    ids = [FLOOR, "odd-3", "staircase", FULL]
    places = [engine.ladder.place(submodel) for submodel in ids]
    expected = [engine.alone(prompt, place, 8) for prompt, place in zip(asked, places, strict=False)]
    floor, full = places[0], places[-1]
    for prompt, first, then in ((asked[4], floor, full), (asked[5], full, floor)):
        began = engine.alone(prompt, first, 3)
        expected.append(began + engine.alone(prompt + began, then, 5))
    given = json.dumps(
        {
            "model": str(BUNDLED),
            "ladder": str(ladder_path),
            "prompts": asked,
            "submodels": [*ids, None, None],
            "program": {"52": [(0, floor), (3, full)], "54": [(0, full), (3, floor)]},
        }
    )
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
