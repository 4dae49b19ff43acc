"""The FFN in width blocks: what takes the place of a stock layer's `mlp` where the ladder has more than one width.

vLLM packs weights after loading (CPU and quantised layouts), so a width cannot be a slice at run time: each block is a
pair of linear layers of its own. Each is sharded over the tensor-parallel ranks by itself, since a prefix of a sharded
matrix is not a prefix of the matrix:

    neurons           0 ....... 128 ....... 256
    unsharded blocks  [   a    ] [    b    ]
    rank 0            a[0:64]    b[128:192]       width 128 is block a on both ranks
    rank 1            a[64:128]  b[192:256]
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed import tensor_model_parallel_all_reduce as all_reduce
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

from sortserve.engine.errors import StartupError
from sortserve.engine.vllm.model.rows import BlockRows
from sortserve.engine.weights import importance_order


class BlockMLP(nn.Module):
    """down(silu(gate x) * up x), in blocks that end at `boundaries` (ascending, the last one the full width)."""

    def __init__(
        self,
        hidden_size: int,
        boundaries: Sequence[int],
        *,
        bias: bool,
        down_bias: bool,
        prefix: str,
        sort: bool = False,
    ) -> None:
        super().__init__()
        self.boundaries = tuple(boundaries)
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self._ranks = ranks
        gate_up, down = [], []
        start = 0
        for number, end in enumerate(self.boundaries):
            width = end - start
            if width % ranks:
                raise StartupError(
                    f"FFN neurons [{start}, {end}) are one block of the ladder's widths and cannot be shared by "
                    f"{ranks} tensor-parallel ranks; use widths that {ranks} divides"
                )
            gate_up.append(
                MergedColumnParallelLinear(hidden_size, [width] * 2, bias=bias, prefix=f"{prefix}.gate_up.{number}")
            )
            down.append(
                RowParallelLinear(
                    width, hidden_size, bias=False, reduce_results=False, prefix=f"{prefix}.down.{number}"
                )
            )
            own = start + rank * (width // ranks) + torch.arange(width // ranks)
            self.register_buffer(f"neurons_{number}", own, persistent=False)  # [block width of this rank]
            start = end
        self.gate_up, self.down = nn.ModuleList(gate_up), nn.ModuleList(down)
        self.down_bias = nn.Parameter(torch.zeros(hidden_size), requires_grad=False) if down_bias else None
        self.act_fn = SiluAndMul()
        self._sort = sort
        self._order: Tensor | None = None  # [width] by importance
        self._waiting: list[tuple[str, Tensor]] = []

    def forward(self, x: Tensor, blocks: Sequence[BlockRows] | None = None) -> Tensor:
        """[rows, hidden] -> [rows, hidden]; rows in none of `blocks` get zeros. None: all rows run all blocks."""
        everyone = BlockRows(x.shape[0])
        chosen = [everyone] * len(self.boundaries) if blocks is None else blocks
        total: Tensor | None = None
        for number, rows in enumerate(chosen):
            part = self._block(number, x if rows.first is None else x[: rows.first], rows)
            if total is None and rows.first == x.shape[0]:
                total = part
                continue
            total = torch.zeros_like(x) if total is None else total
            if rows.index is None:
                total[: rows.first] += part
            else:
                total.index_add_(0, rows.index, part)
        if total is None:
            return torch.zeros_like(x)  # on every rank alike, so nobody waits for a sum
        if self._ranks > 1:
            total = all_reduce(total)
        return self._with_bias(total, chosen[0])

    def _block(self, number: int, x: Tensor, rows: BlockRows) -> Tensor:
        chosen = x if rows.index is None else x[rows.index]
        inner = self.act_fn(self.gate_up[number](chosen)[0])
        if rows.limit is not None:
            inner = inner * (getattr(self, f"neurons_{number}")[None, :] < rows.limit[:, None])
        out: Tensor = self.down[number](inner)[0]
        return out

    def _with_bias(self, total: Tensor, rows: BlockRows) -> Tensor:
        """Everybody with an FFN runs the first block."""
        if self.down_bias is None:
            return total
        if rows.index is not None:
            total[rows.index] += self.down_bias
        else:
            total[: rows.first] += self.down_bias
        return total

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Cut the checkpoint's matrices, named as in a stock layer of vLLM, into the blocks; the names of what was set.

        Where neurons are to be sorted, gate and up wait for down, which tells their order; it may come in a later call.
        """
        loaded: set[str] = set()
        for name, tensor in weights:
            if self._sort and self._order is None and name != "down_proj.weight":
                self._waiting.append((name, tensor))
                continue
            if self._sort and name == "down_proj.weight":
                self._order = importance_order(tensor.to(self.down[0].weight.dtype))  # type: ignore[arg-type]
                self._waiting.append((name, tensor))
                for waiting in self._waiting:
                    loaded |= self._load(*waiting)
                self._waiting = []
                continue
            loaded |= self._load(name, tensor)
        return loaded

    def _load(self, name: str, tensor: Tensor) -> set[str]:
        module, _, kind = name.rpartition(".")
        shard = getattr(tensor, "shard_id", None)
        if name == "down_proj.bias":
            assert self.down_bias is not None
            self.down_bias.data.copy_(tensor)
            return {"down_bias"}
        assert module in ("gate_up_proj", "down_proj"), f"{name} is no part of an FFN"
        if self._order is not None:
            tensor = tensor[self._order] if module == "gate_up_proj" else tensor[:, self._order]
        start = 0
        for number, end in enumerate(self.boundaries):
            if module == "gate_up_proj":
                parameter = getattr(self.gate_up[number], kind)
                parameter.weight_loader(parameter, tensor[start:end], shard)
            else:
                parameter = getattr(self.down[number], kind)
                parameter.weight_loader(parameter, tensor[:, start:end])
            start = end
        part = "gate_up" if module == "gate_up_proj" else "down"
        return {f"{part}.{number}.{kind}" for number in range(len(self.boundaries))}
