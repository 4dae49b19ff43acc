"""The FFN with a width for every row: what takes the place of a stock layer's `mlp` where the ladder cuts its width.

There is one copy of the weights, and a width is a prefix of it. Of several tensor-parallel ranks each has every
`ranks`-th neuron, in order, so that a width is a prefix on all of them, shared out evenly:

    neurons     0 1 2 3 4 5 6 7
    width 5     # # # # #
    rank 0      0 2 4 6            the first 3
    rank 1      1 3 5 7            the first 2

On a CPU the native engine's products (`kernels/products.py`) run in place of vLLM's, whose packed weights have no
prefixes. On a GPU the stock layer runs where all rows have the full width, else the staircase kernel over its matrices.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed import tensor_model_parallel_all_reduce as all_reduce
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from sortserve.engine.vllm.model.rows import Shard
from sortserve.engine.weights import importance_order
from sortserve.kernels.ffn import FfnRows, GatedFfn, plan_rows
from sortserve.kernels.products import Products


class WidthMLP(nn.Module):
    """down(silu(gate x) * up x) of a stock layer, whose linear layers it takes over.

    `boundaries`: the ladder's widths, ascending, the last one the full width. `sort`: put neurons in order of importance.
    `products`: of the CPU; None on a GPU.
    """

    def __init__(self, stock: Any, boundaries: Sequence[int], products: Products | None, *, sort: bool = False) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = stock.gate_up_proj, stock.down_proj, stock.act_fn
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self.shard = Shard(boundaries[-1], (), rank, ranks)
        self._sort = sort
        self._order: Tensor | None = None  # [width]: which neuron of the checkpoint comes where
        self._waiting: list[tuple[str, Tensor]] = []
        self._packed: GatedFfn | None = None
        if products is not None:
            self.gate_up_proj._cpu_skip_gemm_dispatch = True  # vLLM's word for: leave this weight as it is
            self.down_proj.quant_method = _PackWhole(lambda: self._pack(products, boundaries))
        if ranks > 1 and not sort:
            self._order = self._by_rank(torch.arange(boundaries[-1]))

    def forward(self, x: Tensor, rows: FfnRows | None = None) -> Tensor:
        """[rows, hidden] -> [rows, hidden]; rows of width 0 get zeros. `rows` None: all of them have the full width."""
        if rows is None and self._packed is None:
            whole: Tensor = self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]
            return whole
        if rows is None:
            own = self.shard.own(self.shard.full)
            rows = plan_rows([own] * x.shape[0], self.shard.boundaries, x.dtype)
        total = self._staircase(x, rows) if self._packed is None else self._packed.add_to(torch.zeros_like(x), x, rows)
        return all_reduce(total) if self.shard.ranks > 1 else total

    def _staircase(self, x: Tensor, rows: FfnRows) -> Tensor:
        from sortserve.kernels.gpu.ffn import GatedWeights, staircase_ffn

        gate, up = self.gate_up_proj.weight.chunk(2)
        gate_bias, up_bias = (None, None) if self.gate_up_proj.bias is None else self.gate_up_proj.bias.chunk(2)
        weights = GatedWeights(
            gate, up, self.down_proj.weight, gate_bias=gate_bias, up_bias=up_bias, down_bias=self._down_bias
        )
        return staircase_ffn(x, weights, rows.widths)

    @property
    def _down_bias(self) -> Tensor | None:
        """Added once, by the rank that has neurons at every width."""
        bias: Tensor | None = self.down_proj.bias if self.shard.rank == 0 else None
        return bias

    def _pack(self, products: Products, boundaries: Sequence[int]) -> None:
        """Put packed weights in the place of the linear layers', which end here."""
        gate, up = self.gate_up_proj.weight.data.chunk(2)
        gate_bias, up_bias = (None, None) if self.gate_up_proj.bias is None else self.gate_up_proj.bias.data.chunk(2)
        self._packed = products.ffn(
            gate,
            up,
            self.down_proj.weight.data,
            sorted({self.shard.own(end) for end in boundaries} - {0}),
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=self._down_bias,
        )
        self.shard = self.shard.packed(self._packed.boundaries)
        for linear in (self.gate_up_proj, self.down_proj):
            linear.weight = nn.Parameter(torch.empty(0, dtype=gate.dtype), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The checkpoint's matrices, named as in a stock layer of vLLM, with their neurons in our order; the names of what
        was set. Where neurons are to be sorted, gate and up wait for down, which tells their order; it may come in a
        later call."""
        loaded: set[str] = set()
        for name, tensor in weights:
            self._waiting.append((name, tensor))
            if self._sort and self._order is None and name == "down_proj.weight":
                weight: Any = self.down_proj.weight
                self._order = self._by_rank(importance_order(tensor.to(weight.dtype)))
            if self._order is not None or not self._sort:
                loaded |= {self._load(*waiting) for waiting in self._waiting}
                self._waiting = []
        return loaded

    def _by_rank(self, order: Tensor) -> Tensor:
        """So that rank r's share, [r * share, (r + 1) * share), is order[r], order[r + ranks] and so on."""
        return torch.cat([order[rank :: self.shard.ranks] for rank in range(self.shard.ranks)])

    def _load(self, name: str, tensor: Tensor) -> str:
        module, _, kind = name.rpartition(".")
        assert module in ("gate_up_proj", "down_proj"), f"{name} is no part of an FFN"
        parameter = getattr(getattr(self, module), kind)
        shard = getattr(tensor, "shard_id", None)
        if self._order is not None and name != "down_proj.bias":
            tensor = tensor[self._order] if module == "gate_up_proj" else tensor[:, self._order]
        arguments = (parameter, tensor) if shard is None else (parameter, tensor, shard)
        parameter.weight_loader(*arguments)
        return name


class _PackWhole(UnquantizedLinearMethod):
    """Of a down projection: when vLLM would pack it, its whole FFN is packed; gate and up come before it."""

    def __init__(self, pack: Callable[[], None]) -> None:
        super().__init__()
        self._pack = pack

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """See the class."""
        self._pack()
