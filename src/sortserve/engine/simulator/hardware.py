"""Cost models of GPUs that nobody here has: step times from bytes, FLOPs and bandwidth. Every number is stated.

Peak figures are the makers' data sheets (NVIDIA H100 SXM5 and H200 SXM: 989.4 TFLOP/s dense bfloat16 both, 3.35 and
4.8 TB/s, 80 and 141 GB, NVLink 4 450 GB/s in each direction). Shares of them that are reached are assumptions, stated
beside each one below; a fitted cost model of a real machine replaces all of this. A matrix product takes the longer of
reading its weights and computing; kernels that run one after another add up.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sortserve.engine.cost import CostTable
from sortserve.engine.cost_file import read_cost
from sortserve.engine.ladder import Entry, Ladder, Measured, Quality
from sortserve.engine.model_config import load_model_config
from sortserve.engine.rungs import Floats, Rungs
from sortserve.engine.settings import SettingsTable
from sortserve.engine.simulator.memory import KVSizes
from sortserve.engine.simulator.replica_config import ReplicaConfig
from sortserve.engine.simulator.traces import Unloaded
from sortserve.engine.submodel import ModelShape, SubModel


@dataclass(frozen=True)
class Device:
    """One GPU, or `count` of them that split each layer (tensor parallel)."""

    name: str
    flops: float  # peak a second, dense bfloat16
    bandwidth: float  # peak bytes a second
    memory: float  # bytes
    link: float = 450e9  # bytes a second between GPUs, one direction
    count: int = 1
    flops_share: float = 0.65  # reached by large bfloat16 products: cuBLAS gets 600 to 750 of 989 on H100
    attention_share: float = 0.5  # of peak FLOPs in prompt attention; FlashAttention-3's paper: 0.6 to 0.75 on H100
    bandwidth_share: float = 0.8  # of peak when weights or K/V stream; copies reach about 0.9
    link_share: float = 0.7
    layer_seconds: float = 10e-6  # gaps between about 7 kernels of a layer in a CUDA graph, 1.5 us each
    link_seconds: float = 8e-6  # latency of one all-reduce; two a layer
    base_seconds: float = 300e-6  # of a step: launch of the graph, sampling, result to the host
    memory_share: float = 0.9  # of memory for weights and K/V; the rest is activations and the runtime


DEVICES = {
    "h100": Device("h100", 989.4e12, 3.35e12, 80e9),
    "h200": Device("h200", 989.4e12, 4.8e12, 141e9),
}
"""By name; `h200x4` is four of them."""

MODELS = {
    # config.json of meta-llama/Llama-3.1-8B and -70B
    "llama-3.1-8b": ModelShape(32, 4096, 14336, 32, 8, 128, 128256),
    "llama-3.1-70b": ModelShape(80, 8192, 28672, 64, 8, 128, 128256),
}

# Sorted LLaMA (arXiv 2309.08968), Tables 4 and 5: (wins - losses) / 170 of each exit against the full model, 2 epochs
SORTED_LLAMA = {12: -0.797, 16: -0.753, 20: -0.479, 24: -0.268, 28: -0.259, 32: -0.115, 36: -0.076, 40: -0.059}
BACKENDS = {"native": frozenset({"refill", "sit_out", "reuse"}), "vllm": frozenset({"reuse"})}
"""What a policy may use: on vLLM a request that goes deeper is computed again, and all that run take part in a step."""
DEGRADED_BELOW = 0.5
"""Entries of less than this share of the full model's score are not chosen by `auto`."""

_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def device_of(name: str) -> Device:
    """`h200`, `h200x4`. Raises ValueError listing the names there are."""
    base, _, count = name.partition("x")
    if base not in DEVICES or (count and not (count.isdigit() and int(count) >= 1)):
        raise ValueError(f"no device {name!r}; there are: {', '.join(DEVICES)}, and several as {next(iter(DEVICES))}x4")
    return replace(DEVICES[base], name=name, count=int(count or 1))


def sorted_llama_ladder(shape: ModelShape) -> Ladder:
    """Sorted LLaMA's exits at the same share of this model's depth; quality (1 + score) / (1 + score of 40 layers)."""
    entries = []
    for layers, score in SORTED_LLAMA.items():
        depth = round(shape.num_layers * layers / 40)
        quality = (1 + score) / (1 + SORTED_LLAMA[40])
        submodel = SubModel.make(depth, shape.ffn_width)
        entries.append(Entry(f"d{depth}", submodel, Quality(quality), degraded=quality < DEGRADED_BELOW))
    return Ladder.of(shape, entries, Measured("(1 + PandaLM score) / (1 + score of all layers)", "arXiv 2309.08968"))


def cost_of(shape: ModelShape, layers: np.ndarray[tuple[int], np.dtype[np.int64]], device: Device) -> CostTable:
    """The cost table; `layers` [segments] of each segment."""
    flops = device.flops * device.flops_share * device.count
    bandwidth = device.bandwidth * device.bandwidth_share * device.count
    ridge = flops / bandwidth  # bfloat16: 2 bytes and 2 FLOPs a weight and row, so reading bounds up to so many rows
    buckets = np.array(sorted({*_BUCKETS, ridge}), np.float64)

    def product(parameters: int, each_bytes: float) -> Floats:
        return np.maximum(parameters * each_bytes / bandwidth, 2 * parameters * buckets / flops)

    layer_bytes = sum(map(shape.bytes_per_weight, range(shape.num_layers))) / shape.num_layers

    reduced = (
        2 * (device.count - 1) / device.count * shape.hidden_size * 2 * buckets / (device.link * device.link_share)
    )
    link = (device.link_seconds + reduced) if device.count > 1 else np.zeros(len(buckets))
    kv_bytes = shape.kv_bytes_per_token_layer
    pair_flops = 4 * shape.num_heads * shape.head_dim  # scores and their sum over values, 2 FLOPs each
    return CostTable(
        layers=layers,
        buckets=buckets,
        layer=device.layer_seconds + product(shape.attention_parameters, layer_bytes) + 2 * link,
        ffn=product(3 * shape.hidden_size * shape.ffn_width, layer_bytes),
        head=product(shape.head_parameters, shape.bytes_per_weight(None)),
        base=device.base_seconds,
        context_seconds=kv_bytes / bandwidth,
        pair_seconds=pair_flops / (device.flops * device.attention_share * device.count),
        spread=1.0,
    )


def kv_sizes(shape: ModelShape, device: Device) -> KVSizes:
    """What is left for K/V. Raises ValueError if the weights leave nothing."""
    embedding = shape.hidden_size * shape.vocab_size
    weights = SubModel.full(shape).cost(shape).weight_bytes + embedding * shape.dtype_bytes
    capacity = device.memory * device.count * device.memory_share - weights
    if capacity <= 0:
        raise ValueError(f"{weights / 1e9:.0f} GB of weights do not fit into {device.name}; take more of them")
    return KVSizes(shape.kv_bytes_per_token_layer, shape.hidden_size * shape.dtype_bytes, capacity)


def replica_config(model: str, device: str) -> ReplicaConfig:
    """One replica of a model by name on a device by name, with Sorted LLaMA's ladder. Raises ValueError."""
    if model not in MODELS:
        raise ValueError(f"no model {model!r}; there are: {', '.join(MODELS)}")
    shape, gpu = MODELS[model], device_of(device)
    ladder = sorted_llama_ladder(shape)
    rungs = Rungs.of(ladder, SettingsTable(ladder))
    return ReplicaConfig(rungs, cost_of(shape, rungs.layers, gpu), kv_sizes(shape, gpu))


def measured_config(
    folder: Path, cost: Path, kv_bytes: float, *, backend: str = "native", ladder: Ladder | None = None
) -> ReplicaConfig:
    """One replica of the model in `folder` whose steps take what a fitted table in the file `cost` says (the profile of a
    native engine, or what a vLLM one has learned). `ladder`: None for the model's own. Raises ValueError, OSError, and what
    reading the model raises."""
    shape = load_model_config(folder).shape
    if ladder is None:
        ladder = Ladder.of_folder(folder, shape)
    rungs, table = Rungs.of(ladder, SettingsTable(ladder)), read_cost(cost)
    if table.layers.tolist() != rungs.layers.tolist():
        raise ValueError(
            f"{cost}: made for segments of {table.layers.tolist()} layers, {folder} has {rungs.layers.tolist()}"
        )
    kv = KVSizes(shape.kv_bytes_per_token_layer, shape.hidden_size * shape.dtype_bytes, kv_bytes)
    return ReplicaConfig(rungs, table, kv, capabilities=BACKENDS[backend])


def unloaded(config: ReplicaConfig) -> Unloaded:
    """What a lone request takes on the full model: the base of the budgets. A token is at 1,024 tokens of context."""
    from sortserve.engine.cost import StepShape

    rungs = config.rungs
    share = rungs.share[rungs.full]

    def seconds(rows: int, context: int) -> float:
        ones = np.ones(rungs.num_segments)
        pairs = rows * (context - rows / 2) if rows > 1 else 0.0
        shape = StepShape(ones * rows, share * rows, share, ones * context, ones * pairs, np.asarray(1.0))
        return float(config.cost.seconds(shape))

    per_token = (seconds(config.step_tokens, config.step_tokens) - seconds(256, 256)) / (config.step_tokens - 256)
    return Unloaded(max(seconds(256, 256) - 256 * per_token, 0.0), per_token, seconds(1, 1024))
