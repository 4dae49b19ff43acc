"""Torch in place of the Triton kernels, with the same contracts, so that long schedules run in seconds: the interpreter
takes a millisecond for every program. What a kernel must not read is NaN here, so that who reads it is found out."""

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sortserve.kernels.gpu import backends


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _norm(total, weight, eps), total


def gather_norm(hidden: Tensor, index: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(hidden[index], weight, eps)


def _wide(weight: Tensor, scale: Tensor | None) -> Tensor:
    return weight if scale is None else weight.float() * scale[:, None]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    return F.linear(x, _wide(weight, scale), bias)


def staircase_ffn(
    x: Tensor, weights: Any, widths: Tensor, residual: Tensor, *, activation: str, out: Tensor | None, **_: Any
) -> Tensor:
    assert activation == "silu"
    gate = linear(x, weights.gate, weights.gate_bias, weights.gate_scale)
    inner = F.silu(gate) * linear(x, weights.up, weights.up_bias, weights.up_scale)
    inner = inner.masked_fill(torch.arange(inner.shape[1]) >= widths[:, None], 0.0)
    added = linear(inner, weights.down, weights.down_bias, weights.down_scale)
    result = torch.where(widths[:, None] > 0, added + residual, residual)
    return result if out is None else out.copy_(result)


def rope_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    pool: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    page_layers: int,
    layer_in_page: int,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
) -> Tensor:
    heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, -1)
    query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], 1)
    if query_norm is not None and key_norm is not None:
        query, key = _norm(query, query_norm, eps), _norm(key, key_norm, eps)
    turns = torch.complex(cos, sin)[positions.clamp(min=0).long()][:, None]

    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.contiguous().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(-2)

    writing = slots >= 0
    flat, size = pool.view(-1, pool.shape[2]), pool.shape[1]
    limit = 448.0 if pool.dtype == torch.float8_e4m3fn else torch.inf
    for kept, first in ((turn(key), layer_in_page), (value, page_layers + layer_in_page)):
        kept = kept.flatten(1)[writing].clamp(-limit, limit)
        flat[slots[writing] + first * size] = kept.to(pool.dtype)
    return turn(query).masked_fill((positions < 0)[:, None, None], 0.0)


def paged_attention(
    query: Tensor,
    pool: Tensor,
    batch: Any,
    layer: Any,
    **_: Any,
) -> Tensor:
    num_rows, num_heads, head_dim = query.shape
    out = query.new_full((num_rows, num_heads * head_dim), torch.nan)
    size = pool.shape[1]
    out[batch.row_position < 0] = 0.0
    tiles = [(row, 1) for row in range(num_rows)]
    if batch.max_tile_rows > 1:
        tiles = list(zip(batch.tile_first_row.tolist(), batch.tile_rows.tolist(), strict=True))
    for first, count in tiles:
        position = int(batch.row_position[first]) if count else -1
        if position < 0:
            continue
        seat = int(batch.row_sequence[first])
        assert batch.row_sequence[first : first + count].tolist() == [seat] * count
        assert count <= batch.max_tile_rows
        stop = position + count
        pages = batch.tables[seat, : -(-stop // size)].long() * 2 * layer.page_layers + layer.layer_in_page
        shape = (-1, layer.num_kv_heads, head_dim)
        key, value = (pool[pages + at].to(query.dtype).reshape(shape)[:stop] for at in (0, layer.page_layers))
        seen = torch.arange(stop) <= position + torch.arange(count)[:, None]
        if layer.window is not None:
            seen &= torch.arange(stop) > position + torch.arange(count)[:, None] - layer.window
        attended = F.scaled_dot_product_attention(
            query[first : first + count].transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=seen,
            enable_gqa=True,
        )
        out[first : first + count] = attended[0].transpose(0, 1).flatten(1)
    return out


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    ids = logits.argmax(1)
    return ids, logits.log_softmax(1).gather(1, ids[:, None])[:, 0]


def put_in_place(monkeypatch: pytest.MonkeyPatch, forward: ModuleType) -> None:
    """Let `forward`, the module, call the functions above."""
    for kernel in (
        rms_norm,
        add_rms_norm,
        gather_norm,
        linear,
        staircase_ffn,
        rope_and_write,
        argmax,
    ):
        monkeypatch.setattr(forward, kernel.__name__, kernel)
    monkeypatch.setattr(
        backends, "paged_attention", paged_attention
    )  # runners made from now on choose among the offers
