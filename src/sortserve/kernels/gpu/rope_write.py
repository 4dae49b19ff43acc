"""QK-norm, rotary embedding and the K/V page write in one kernel: reads a row's Q, K and V once, writes each once.

With x the D elements of a Q or K head in rotary pairs (x0, y0, x1, y1, ...), and position p:

    n      = x / sqrt(mean(x^2) + eps) * norm weight          (only with QK-norm)
    x'_i   = n_xi cos[p, i] - n_yi sin[p, i]                   pair i
    y'_i   = n_yi cos[p, i] + n_xi sin[p, i]

Q' goes to `out`; K' and V (as it is) go to the pool [num_pages * 2 * g, block_tokens, kv_heads * head_dim], to token
slots `slot + layer_in_page * block_tokens` and `slot + (g + layer_in_page) * block_tokens`. A slot of -1 writes no K/V;
a position of -1 is a padding row: it reads nothing, and its query is zeros. Float32 inside, rounded once at the end.
An fp8 pool holds K / key_scale and V / value_scale, clamped to the type's range.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS_PER_PROGRAM = 4  # 48 heads of an 8B model are 12 programs a row: enough at one row, few at thousands
FP8_MAX = 448.0  # of float8_e4m3fn


@triton.jit(do_not_specialize=["layer_in_page"])
def _rope_and_write_kernel(
    qkv: "Any",  # [rows, (HEADS + 2 KV_HEADS) * HEAD_DIM]
    cos: "Any",  # float32 [max_len, HEAD_DIM / 2]
    sin: "Any",
    positions: "Any",  # int32 [rows]
    slots: "Any",  # int64 [rows]
    query_norm: "Any",  # [HEAD_DIM] or None
    key_norm: "Any",
    pool: "Any",
    out: "Any",  # [rows, HEADS, HEAD_DIM]
    qkv_stride: "Any",
    layer_in_page: "Any",
    eps: "Any",
    key_factor: "Any",  # 1 / scale
    value_factor: "Any",
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,  # a power of two
    BLOCK_TOKENS: tl.constexpr,
    PAGE_LAYERS: tl.constexpr,
    NORM: tl.constexpr,
    FP8_LIMIT: tl.constexpr,  # 0: the pool has the model's dtype
    BLOCK_HEADS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dim = tl.arange(0, PADDED_DIM)
    pair = tl.arange(0, PADDED_DIM // 2)
    position = tl.load(positions + row)
    slot = tl.load(slots + row)
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (dim < HEAD_DIM)[None, :]

    query_out = out + row * (HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + dim[None, :]
    queries = inside & is_query[:, None]
    if position < 0:
        tl.store(query_out, tl.zeros((BLOCK_HEADS, PADDED_DIM), out.dtype.element_ty), mask=queries)
        return

    source = qkv + row * qkv_stride + head[:, None] * HEAD_DIM + dim[None, :]
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_HEADS, PADDED_DIM]
    normed = x
    if NORM:
        weight = tl.load(query_norm + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        weight_key = tl.load(key_norm + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)
        normed = x * inverse[:, None] * tl.where(is_query[:, None], weight[None, :], weight_key[None, :])

    in_table = pair < HEAD_DIM // 2
    c = tl.load(cos + position * (HEAD_DIM // 2) + pair, mask=in_table, other=0.0)[None, :]
    s = tl.load(sin + position * (HEAD_DIM // 2) + pair, mask=in_table, other=0.0)[None, :]
    # one contiguous load and a split in registers: two loads of every second element could not be vectors
    first, second = tl.split(tl.reshape(normed, (BLOCK_HEADS, PADDED_DIM // 2, 2)))
    turned = tl.reshape(tl.join(first * c - second * s, second * c + first * s), (BLOCK_HEADS, PADDED_DIM))
    result = tl.where(is_value[:, None], x, turned)

    tl.store(query_out, result.to(out.dtype.element_ty), mask=queries)
    if slot < 0:
        return

    kv_head = tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS)
    layer = layer_in_page + tl.where(is_value, PAGE_LAYERS, 0)  # [BLOCK_HEADS]
    token = slot + layer.to(tl.int64) * BLOCK_TOKENS
    target = pool + token[:, None] * (KV_HEADS * HEAD_DIM) + kv_head[:, None] * HEAD_DIM + dim[None, :]
    if FP8_LIMIT > 0:
        result = result * tl.where(is_value, value_factor, key_factor)[:, None]
        result = tl.minimum(tl.maximum(result, -FP8_LIMIT), FP8_LIMIT)
    tl.store(target, result.to(pool.dtype.element_ty), mask=inside & (head >= HEADS)[:, None])


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
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    key_scale: float | None = None,
    value_scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """qkv [rows, (num_heads + 2 num_kv_heads) * head_dim] -> rotated queries [rows, num_heads, head_dim]; K/V into `pool`.

    `cos`, `sin` float32 [max_len, head_dim / 2]; `positions` int32 [rows], -1 for padding; `slots` int64 [rows], the
    token slot of the K of the page's layer 0 (page * 2 * page_layers * block_tokens + position % block_tokens), -1 to
    write no K/V. Norm weights [head_dim] are in pairs like the heads. Raises ValueError for what does not fit.
    """
    rows = qkv.shape[0]
    total_heads = num_heads + 2 * num_kv_heads
    head_dim = qkv.shape[1] // total_heads
    _check(qkv, cos, sin, positions, slots, pool, num_kv_heads, head_dim, total_heads)
    if not 0 <= layer_in_page < page_layers or pool.shape[0] % (2 * page_layers):
        raise ValueError(f"layer {layer_in_page} of {page_layers} in a page, pool of {pool.shape[0]} rows")
    if (query_norm is None) != (key_norm is None):
        raise ValueError("QK-norm needs both weights")
    for norm in (query_norm, key_norm):
        if norm is not None and (tuple(norm.shape) != (head_dim,) or not norm.is_contiguous()):
            raise ValueError(f"norm weight {tuple(norm.shape)}, expected a contiguous ({head_dim},)")
    fp8 = pool.dtype == torch.float8_e4m3fn
    if not fp8 and (key_scale is not None or value_scale is not None):
        raise ValueError(f"key_scale and value_scale are for float8_e4m3fn pools, not {pool.dtype}")
    if out is None:
        out = torch.empty(rows, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    elif tuple(out.shape) != (rows, num_heads, head_dim) or not out.is_contiguous() or out.dtype != qkv.dtype:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype}, expected contiguous {(rows, num_heads, head_dim)}")
    if rows == 0:
        return out
    _rope_and_write_kernel[(rows, triton.cdiv(total_heads, HEADS_PER_PROGRAM))](
        qkv,
        cos,
        sin,
        positions,
        slots,
        query_norm,
        key_norm,
        pool,
        out,
        qkv.stride(0),
        layer_in_page,
        eps,
        1.0 / (key_scale or 1.0),
        1.0 / (value_scale or 1.0),
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        BLOCK_TOKENS=pool.shape[1],
        PAGE_LAYERS=page_layers,
        NORM=query_norm is not None,
        FP8_LIMIT=FP8_MAX if fp8 else 0.0,
        BLOCK_HEADS=HEADS_PER_PROGRAM,
        num_warps=1 if head_dim <= 64 else 2,
    )
    return out


def _check(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    pool: Tensor,
    num_kv_heads: int,
    head_dim: int,
    total_heads: int,
) -> None:
    rows = qkv.shape[0]
    if qkv.dim() != 2 or qkv.stride(1) != 1 or qkv.shape[1] != total_heads * head_dim or head_dim % 2:
        raise ValueError(f"qkv {tuple(qkv.shape)} with strides {qkv.stride()} does not hold {total_heads} even heads")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or table.shape[1:] != (head_dim // 2,) or not table.is_contiguous():
            raise ValueError(f"{name} {tuple(table.shape)} {table.dtype}, expected float32 (max_len, {head_dim // 2})")
    for name, index, dtype in (("positions", positions, torch.int32), ("slots", slots, torch.int64)):
        if tuple(index.shape) != (rows,) or index.dtype != dtype or not index.is_contiguous():
            raise ValueError(f"{name} {tuple(index.shape)} {index.dtype}, expected contiguous {dtype} ({rows},)")
    if pool.dim() != 3 or pool.shape[2] != num_kv_heads * head_dim or not pool.is_contiguous():
        raise ValueError(f"pool {tuple(pool.shape)}, expected contiguous (.., .., {num_kv_heads * head_dim})")
    if pool.dtype not in (qkv.dtype, torch.float8_e4m3fn):
        raise ValueError(f"a pool of {pool.dtype} for rows of {qkv.dtype}")
    if len({tensor.device for tensor in (qkv, cos, sin, positions, slots, pool)}) > 1:
        raise ValueError("all tensors must be on one device")


def reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in float64: (query, key, value), each [rows, its heads, head_dim]; positions must be >= 0."""
    heads = qkv.double().view(qkv.shape[0], num_heads + 2 * num_kv_heads, -1)
    num_rotated = num_heads + num_kv_heads
    query, key, value = heads[:, :num_heads], heads[:, num_heads:num_rotated], heads[:, num_rotated:]
    rotation = torch.complex(cos.double(), sin.double())[positions.long()][:, None]

    def turn(x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.double()
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * rotation).flatten(-2)

    return turn(query, query_norm), turn(key, key_norm), value
