"""Logits on the GPU in bfloat16 against transformers' Llama in float64 on the same weights.

The tolerance is derived, not chosen: transformers' own model in bfloat16 differs from float64 by so much, and ours may
differ by half as much again. That a mistake would be seen is shown each time: the widths of one step are shifted by one
row, and the error must then be over the tolerance.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.common import Clock, model_dtype, small
from benchmarks.gpu.model import TINY, Bench, DeviceDummy, Setup
from sortserve.engine.plan import Plan
from sortserve.engine.submodel import ModelShape
from sortserve.kernels.gpu.ffn import GatedWeights, staircase_ffn
from sortserve.kernels.gpu.ffn import reference as ffn_reference
from sortserve.kernels.gpu.ffn_tma import has_tma

MEDIUM = Setup(
    "small Llama", ModelShape(6, 1024, 2816, 16, 4, 64, 4096, 2), (2, 4, 6), (1408, 2048, 2816), 16, 512, False
)
SLACK = 1.5
FLOAT32_ERROR = 1e-4
"""Under the interpreter, where everything is float32."""
INTERPRETED_FP8_ERROR = 0.2
"""There, with K/V in fp8: it loses the carry into the exponent, so one value in sixteen is half of what it should be."""


@dataclass(frozen=True)
class Check:
    """One comparison: the relative error of the logits, and what is allowed."""

    what: str
    error: float
    allowed: float
    must_fail: bool = False  # a planted mistake: the error has to be over what is allowed

    @property
    def passed(self) -> bool:
        """Whether it came out as it must."""
        return (self.error > self.allowed) if self.must_fail else (self.error <= self.allowed)


def run(
    device: torch.device, clock: Clock, say: Callable[[str], None], checks: list[Check], *, eager_only: bool = False
) -> None:
    """Prompts in chunks, decode at every depth and width in one step, as graphs and kernel by kernel; added to `checks`."""
    for check in ffn_checks(device):
        _note(check, say, checks)
    setup = TINY if small(device) else MEDIUM
    for eager in (True,) if eager_only else (False, True):
        bench = Bench.build(setup, device, model_dtype(device), eager=eager)
        oracle = Oracle(bench)
        for check in _checks(bench, oracle, "kernel by kernel" if eager else "graphs"):
            _note(check, say, checks)
            if clock.spent():
                say("  no time left for the other checks")
                return
    narrow = Bench.build(
        replace(setup, shape=replace(setup.shape, kv_value_bytes=1)), device, model_dtype(device), eager=True
    )
    for check in _checks(narrow, Oracle(narrow), "fp8 K/V, kernel by kernel"):
        _note(check, say, checks)


def _note(check: Check, say: Callable[[str], None], checks: list[Check]) -> None:
    checks.append(check)
    word = "ok    " if check.passed else "FAILED"
    say(f"  {word} {check.what}: relative error {check.error:.2e}, allowed {check.allowed:.2e}")


def ffn_checks(device: torch.device) -> Iterator[Check]:
    """The FFN of a prompt's rows, with and without tensor descriptors, mixed widths, against float64. Allowed: the roundings
    of `inner` and of the result, and of the sums of float32."""
    rows, hidden, width = (66, 32, 136) if small(device) else (600, 1024, 2824)
    dtype = model_dtype(device)
    gate, up, down = (
        torch.randn(*shape, device=device).mul(shape[1] ** -0.5).to(dtype)
        for shape in ((width, hidden), (width, hidden), (hidden, width))
    )
    weights, x = GatedWeights(gate, up, down), torch.randn(rows, hidden, device=device).to(dtype)
    widths = (torch.arange(rows, 0, -1, device=device) * width // rows).int()
    expected = ffn_reference(x, weights, widths)
    allowed = 2 * torch.finfo(dtype).eps / 2 + 4 * (hidden + width) ** 0.5 * 2.0**-24
    kinds = (False, True) if small(device) or has_tma(device) else (False,)
    for tma, shift in [(kind, 0) for kind in kinds] + [(kinds[-1], 8)]:
        found = staircase_ffn(x, weights, (widths - shift).clamp_min(0), tma=tma).double()
        error = float(((found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)).max())
        how = "with tensor descriptors" if tma else "with pointers"
        told = f"planted, 8 neurons too few {how}" if shift else how
        yield Check(f"FFN of {rows} rows: {told}", error, allowed, must_fail=shift > 0)


class Oracle:
    """transformers' Llama with the bench's weights; over K and V rounded to e4m3 if the bench's are."""

    def __init__(self, bench: Bench) -> None:
        import transformers  # several seconds

        self._cache = _rounding_cache() if bench.geometry.kv_value_bytes == 1 else None
        shape, source = bench.setup.shape, DeviceDummy(bench.config, bench.device)
        self._shape = shape
        library: Any = transformers  # its types do not know all that its models take
        config = library.LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_width,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            rms_norm_eps=bench.config.rms_eps,
            **_rope(transformers.__version__, bench.config.rope.theta),
            max_position_embeddings=bench.setup.context,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
        model = library.LlamaForCausalLM(config).to(bench.device)
        names = [name for name, _ in model.named_parameters()]
        # rounded to the model's dtype first, so that both have the same weights
        model.load_state_dict({name: source.read(name, bench.dtype).float() for name in names})
        self._rounded = copy.deepcopy(model).to(bench.dtype).eval()
        # a cast would round the frequencies too, and make the tolerance wider than it should be
        self._rounded.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.clone()
        self._exact = model.double().eval()

    @torch.inference_mode()
    def logits(self, tokens: list[int], depth: int, width: int, *, exact: bool) -> Tensor:
        """Logits after the last token of the sub-model, float64 on the host."""
        model = self._exact if exact else self._rounded
        inner, device = model.model, model.lm_head.weight.device
        layers = inner.layers
        saved = [
            (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight) for mlp in (one.mlp for one in layers)
        ]
        try:
            for layer, (gate, up, down) in zip(layers, saved, strict=True):
                layer.mlp.gate_proj.weight = _parameter(gate[:width])
                layer.mlp.up_proj.weight = _parameter(up[:width])
                layer.mlp.down_proj.weight = _parameter(down[:, :width])
            inner.layers = layers[:depth]
            cached: dict[str, Any] = {} if self._cache is None else {"past_key_values": self._cache()}
            ids = torch.tensor([tokens], device=device)
            answer: Tensor = model(ids, use_cache=bool(cached), **cached).logits[0, -1]
        finally:
            inner.layers = layers
            for layer, (gate, up, down) in zip(layers, saved, strict=True):
                layer.mlp.gate_proj.weight = gate
                layer.mlp.up_proj.weight = up
                layer.mlp.down_proj.weight = down
        return answer.double().cpu()


def _rope(version: str, theta: float) -> dict[str, Any]:
    """transformers' way to name the base: it changed with 5."""
    if int(version.partition(".")[0]) >= 5:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    return {"rope_theta": theta}


def _rounding_cache() -> Callable[[], Any]:
    """transformers' cache, of K and V as an fp8 pool holds them."""
    import transformers

    library: Any = transformers

    class Rounding(library.DynamicCache):  # type: ignore[misc]
        def update(self, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Any:
            narrow = [x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) for x in (key, value)]
            return super().update(*narrow, *arguments, **options)

    return Rounding


def _parameter(weight: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(weight, requires_grad=False)


def _checks(bench: Bench, oracle: Oracle, how: str) -> list[Check]:
    setup = bench.setup
    kinds = [(depth, width) for depth in setup.depths for width in setup.widths]
    kinds = kinds[:: max(1, len(kinds) // setup.max_running)][: setup.max_running]
    lengths = [setup.context // 2 - 5 * number - 3 for number in range(len(kinds))]
    parts = []
    for number, ((depth, width), length) in enumerate(zip(kinds, lengths, strict=True)):
        place = bench.place(depth, width)
        middle = length // 2
        bench.runner.run(bench.plan([bench.part(number, place, 0, middle)]))
        bench.runner.run(bench.plan([bench.part(number, place, middle, length - 1)]))
        parts.append(bench.part(number, place, length - 1, length))
    plan = bench.plan(parts)
    expected = {
        part.request_id: oracle.logits(list(part.tokens), *kinds[int(part.request_id[1:])], exact=True)
        for part in parts
    }
    rounded = [
        _error(
            oracle.logits(list(part.tokens), *kinds[int(part.request_id[1:])], exact=False), expected[part.request_id]
        )
        for part in parts
    ]
    interpreted = FLOAT32_ERROR if bench.geometry.kv_value_bytes > 1 else INTERPRETED_FP8_ERROR
    allowed = interpreted if small(bench.device) else SLACK * max(rounded)
    found = _logits(bench, plan)
    checks = [
        Check(
            f"{how}: mixed step, depth {kinds[int(part.request_id[1:])][0]}, width {kinds[int(part.request_id[1:])][1]}, "
            f"context {part.stop}",
            _error(found[part.request_id], expected[part.request_id]),
            allowed,
        )
        for part in plan.sequences
    ]
    shifted = _logits(bench, plan, shift_widths=True)
    worst = max(_error(shifted[name], expected[name]) for name in expected)
    return [*checks, Check(f"{how}: planted, widths of the neighbouring row", worst, allowed, must_fail=True)]


def _logits(bench: Bench, plan: Plan, *, shift_widths: bool = False) -> dict[str, Tensor]:
    """Logits of each sequence of a step, float64 on the host."""
    step = bench.runner.prepared(plan)
    if shift_widths:
        step.buffers.host["width"][:] = np.roll(step.buffers.host["width"], 1, axis=1)
        step.buffers.upload()
    output = step.launch()
    assert output is not None
    logits = output.logits.double().cpu()
    return {part.request_id: logits[row] for row, part in enumerate(plan.sequences)}


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
