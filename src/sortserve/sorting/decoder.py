"""One model for calibration, search and measuring: whole texts in, any sub-model, no K/V cache.

`Decoder.layer` runs one layer for texts [texts, tokens], padded on the right (attention is causal, so padding reaches no
real token), at a width and with or without attention's output. Widths are prefixes of the same matrices, as the engine
serves them: the last neurons are not computed at all, which equals computing and masking them. Weights are plain
tensors in the checkpoint's layout, so gradients flow through them and they can be permuted in place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sortserve.engine.checkpoint import Checkpoint, LayerNames, WeightSource
from sortserve.engine.errors import ModelFolderError
from sortserve.engine.model_config import ModelConfig, load_model_config
from sortserve.engine.rope import rope_table
from sortserve.engine.submodel import LayerSettings, SubModel

Watch = Callable[[int, Tensor], Tensor]
"""Called with (layer, activations [texts, tokens, width] that enter `down`); what it returns goes on."""


@dataclass(slots=True)
class Layer:
    """Weights of one layer as in the checkpoint: matrices [outputs, inputs], None where the model has no such tensor."""

    input_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    post_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    def permute_ffn(self, order: Tensor) -> None:
        """Put the FFN's neurons in `order` [width]; the full layer's output stays as it is, up to rounding of sums."""
        self.gate, self.up, self.down = self.gate[order], self.up[order], self.down[:, order].contiguous()
        self.gate_bias = None if self.gate_bias is None else self.gate_bias[order]
        self.up_bias = None if self.up_bias is None else self.up_bias[order]


class Decoder:
    """All weights, plain; and the arithmetic of the Llama family on them. The sub-model is an argument."""

    def __init__(self, source: WeightSource, config: ModelConfig, dtype: torch.dtype, max_tokens: int = 2048) -> None:
        """Reads every tensor. Raises ModelFolderError, naming the tensor, if one holds NaN or infinity."""
        names = source.names
        self.config = config
        self.dtype = dtype
        self.embedding = _finite(source, names.embed, dtype)
        self.head = self.embedding if config.tie_embeddings else _finite(source, names.lm_head, dtype)
        self.final_norm = _finite(source, names.final_norm, dtype)
        self.layers = [_layer(source, layer, dtype) for layer in names.layers]
        cos, sin = rope_table(config.rope, config.shape.head_dim, max_tokens)
        self._rotation = (torch.cat([cos, cos], -1).to(dtype), torch.cat([sin, sin], -1).to(dtype))
        self.max_tokens = max_tokens

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, max_tokens: int = 2048) -> "Decoder":
        """Of a model folder. Raises ModelFolderError for a missing, foreign, truncated or NaN checkpoint."""
        config = load_model_config(folder)
        return cls(Checkpoint.open(folder, config), config, dtype, min(max_tokens, config.max_context))

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [texts, tokens] -> [texts, tokens, hidden]."""
        return F.embedding(tokens, self.embedding)

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows [rows, hidden] before the final norm -> float32 logits [rows, vocab]."""
        return F.linear(self._norm(hidden, self.final_norm), self.head).float()

    def layer(self, number: int, hidden: Tensor, width: int, attend: bool = True, watch: Watch | None = None) -> Tensor:
        """hidden [texts, tokens, hidden] through one layer at `width` (0: no FFN); `attend` False leaves attention out."""
        if attend:
            hidden = hidden + self.attention(number, hidden)
        if width > 0:
            hidden = hidden + self.ffn(number, hidden, width, watch)
        return hidden

    def attention(self, number: int, hidden: Tensor) -> Tensor:
        """What layer `number`'s attention adds."""
        weights, shape = self.layers[number], self.config.shape
        texts, tokens, _ = hidden.shape
        normed = self._norm(hidden, weights.input_norm)
        query = F.linear(normed, weights.q, weights.q_bias).view(texts, tokens, -1, shape.head_dim)
        key = F.linear(normed, weights.k, weights.k_bias).view(texts, tokens, -1, shape.head_dim)
        value = F.linear(normed, weights.v, weights.v_bias).view(texts, tokens, -1, shape.head_dim)
        if weights.q_norm is not None and weights.k_norm is not None:
            query, key = self._norm(query, weights.q_norm), self._norm(key, weights.k_norm)
        query, key = self._rotate(query).transpose(1, 2), self._rotate(key).transpose(1, 2)
        mask = self._window(tokens)
        attended = F.scaled_dot_product_attention(
            query, key, value.transpose(1, 2), attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return F.linear(attended.transpose(1, 2).reshape(texts, tokens, -1), weights.o, weights.o_bias)

    def ffn(self, number: int, hidden: Tensor, width: int, watch: Watch | None = None) -> Tensor:
        """What the first `width` neurons of layer `number`'s FFN add."""
        weights = self.layers[number]
        normed = self._norm(hidden, weights.post_norm)
        gate = F.linear(normed, weights.gate[:width], _first(weights.gate_bias, width))
        inner = F.silu(gate) * F.linear(normed, weights.up[:width], _first(weights.up_bias, width))
        if watch is not None:
            inner = watch(number, inner)
        return F.linear(inner, weights.down[:, :width], weights.down_bias)

    def run(self, tokens: Tensor, submodel: SubModel) -> Tensor:
        """tokens [texts, tokens] -> [texts, tokens, hidden] at the sub-model's exit, before the final norm."""
        hidden = self.embed(tokens)
        for number, (width, attend) in enumerate(submodel.settings(0, submodel.depth)):
            hidden = self.layer(number, hidden, width, attend)
        return hidden

    def run_pair(self, tokens: Tensor, is_prompt: Tensor, prompt: SubModel, answer: SubModel) -> Tensor:
        """`run` with the tokens of `is_prompt` [texts, tokens] on one sub-model and the rest on another, of one depth."""
        assert prompt.depth == answer.depth, "tokens of one text need K/V at the same depth"
        hidden = self.embed(tokens)
        both = zip(prompt.settings(0, prompt.depth), answer.settings(0, answer.depth), strict=True)
        for number, settings in enumerate(both):
            if settings[0] == settings[1]:
                hidden = self.layer(number, hidden, *settings[0])
                continue
            attended = self.attention(number, hidden)
            on = torch.where(is_prompt, settings[0][1], settings[1][1])[..., None]
            hidden = hidden + attended * on
            added = torch.zeros_like(hidden)
            for chosen, (width, _) in ((is_prompt, settings[0]), (~is_prompt, settings[1])):
                if width > 0:
                    added[chosen] = self.ffn(number, hidden[chosen][None], width)[0]
            hidden = hidden + added
        return hidden

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.rms_eps)

    def _rotate(self, x: Tensor) -> Tensor:
        """x [texts, tokens, heads, head_dim]; the first and the second half of a head turn as pairs."""
        cos, sin = (table[: x.shape[1], None] for table in self._rotation)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def _window(self, tokens: int) -> Tensor | None:
        window = self.config.sliding_window
        if window is None or window >= tokens:
            return None
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
        return (distance >= 0) & (distance < window)


class SharedRun:
    """Sub-models one after the other on the same texts; what a sub-model has in common with the one that was kept, from
    the first layer on, is not computed again."""

    def __init__(self, decoder: Decoder, tokens: Tensor) -> None:
        self._decoder = decoder
        self._states = [decoder.embed(tokens)]  # after so many layers of the kept sub-model
        self._settings: LayerSettings = ()

    def run(self, submodel: SubModel, *, keep: bool = True) -> Tensor:
        """[texts, tokens, hidden] at the sub-model's exit; `keep`: later ones start from this one."""
        settings = submodel.settings(0, submodel.depth)
        shared = 0
        while shared < min(len(settings), len(self._settings)) and settings[shared] == self._settings[shared]:
            shared += 1
        states = self._states[: shared + 1]
        hidden = states[-1]
        for number in range(shared, submodel.depth):
            hidden = self._decoder.layer(number, hidden, *settings[number])
            if keep:
                states.append(hidden)
        if keep:
            self._states, self._settings = states, settings
        return hidden


def _first(bias: Tensor | None, width: int) -> Tensor | None:
    return None if bias is None else bias[:width]


def _layer(source: WeightSource, names: LayerNames, dtype: torch.dtype) -> Layer:
    return Layer(**{field: _finite(source, name, dtype) for field, name in names.present().items()})


def _finite(source: WeightSource, name: str, dtype: torch.dtype) -> Tensor:
    tensor = source.read(name, dtype)
    # one sum tells of any NaN or infinity among the values, without a mask as large as the tensor
    if not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ModelFolderError(f"tensor {name} holds NaN or infinity in {bad} places; download the weights again")
    return tensor
