"""The depth head: how deep the next token must run, read off the token just drawn. PALBERT's Q-exit, one step ahead.

    input   = [final norm of the state at the exit; embedding of the token drawn there]
    inner   = tanh(input W1[exit]' + b1[exit]);  lambda = sigmoid(inner W2[exit]' + b2[exit])
    P(the next token needs at most exits 0..k) = 1 - product over j <= k of (1 - lambda_j)

A token *needs* the shallowest exit from which on every exit's likeliest token is the full model's. PALBERT asks its head at
every layer of the token itself; here the answer comes before the next token starts, so that its depth is known when the
step is planned, and a head of the vocabulary is read once per token as ever. Made by `sortserve ladder head`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sortserve.engine.errors import LadderError
from sortserve.engine.submodel import ModelShape

MOST_SHARE = 0.01
"""Of a layer's weights that a row may read here."""
MOST_INNER = 64


def inner_width(shape: ModelShape, num_exits: int) -> int:
    """The most inner units that `MOST_SHARE` leaves, at most `MOST_INNER`; at least one."""
    most = MOST_SHARE * shape.layer_parameters
    return max(1, min(MOST_INNER, int((most - num_exits) / (2 * shape.hidden_size + num_exits + 1))))


@dataclass(frozen=True)
class DepthHead:
    """Weights in float32. Exits are counted from 0; the deepest needs no hazard, whatever is left needs it."""

    inner: Tensor  # [exits, units, 2 * hidden], by the exit whose state is read
    inner_bias: Tensor  # [exits, units]
    hazard: Tensor  # [exits, exits - 1, units]
    hazard_bias: Tensor  # [exits, exits - 1]

    def __post_init__(self) -> None:
        exits, units, _ = self.inner.shape
        assert self.inner_bias.shape == (exits, units)
        assert self.hazard.shape == (exits, exits - 1, units)
        assert self.hazard_bias.shape == (exits, exits - 1)

    @classmethod
    def load(cls, path: Path, num_exits: int, hidden_size: int) -> "DepthHead":
        """Raises LadderError, naming the file, if it is missing, malformed or made for another ladder or model."""
        try:
            tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise LadderError(f"{path}: {error}") from error
        names = ("inner", "inner_bias", "hazard", "hazard_bias")
        if sorted(tensors) != sorted(names):
            raise LadderError(
                f"{path}: has {', '.join(sorted(tensors)) or 'nothing'}, wants {', '.join(sorted(names))}"
            )
        units = tensors["inner"].shape[1] if tensors["inner"].dim() == 3 else 0
        wanted = {
            "inner": (num_exits, units, 2 * hidden_size),
            "inner_bias": (num_exits, units),
            "hazard": (num_exits, num_exits - 1, units),
            "hazard_bias": (num_exits, num_exits - 1),
        }
        for name, shape in wanted.items():
            if tuple(tensors[name].shape) != shape or not bool(tensors[name].isfinite().all()):
                raise LadderError(
                    f"{path}: {name} is {list(tensors[name].shape)}, must be finite and {list(shape)}: "
                    f"{num_exits} exits, hidden size {hidden_size}; make it again with `sortserve ladder head`"
                )
        return cls(**tensors)

    def save(self, path: Path) -> None:
        """As `load` reads it, in bfloat16: its size is the point, and its inputs have no more digits."""
        tensors = {name: tensor.bfloat16().contiguous() for name, tensor in vars(self).items()}
        path.write_bytes(save(tensors))  # save_file would make it unreadable for others

    @property
    def num_exits(self) -> int:
        """Exits of the ladder that it was made for."""
        return self.inner.shape[0]

    def layer_share(self, shape: ModelShape) -> float:
        """Weights that a row reads here over those of a layer; multiply-adds are in the same proportion."""
        return float(sum(tensor[0].numel() for tensor in vars(self).values()) / shape.layer_parameters)

    def logits(self, exit: int, normed: Tensor, drawn: Tensor) -> Tensor:
        """Logits of the hazards [rows, exits - 1], from states of one exit and the drawn tokens' embeddings, both
        [rows, hidden]."""
        inputs = torch.cat([normed, drawn], 1).float()
        inner = torch.addmm(self.inner_bias[exit], inputs, self.inner[exit].T).tanh()
        return torch.addmm(self.hazard_bias[exit], inner, self.hazard[exit].T)

    def within(self, exits: Sequence[int], normed: Tensor, drawn: Tensor) -> Tensor:
        """[rows, exits] probability that the next token needs at most each exit; `exits` says where each row's state is
        from."""
        found = torch.ones(len(exits), self.num_exits)
        for exit in sorted(set(exits)):
            rows = [row for row, own in enumerate(exits) if own == exit]
            found[rows, :-1] = within(self.logits(exit, normed[rows], drawn[rows]))
        return found


def within(logits: Tensor) -> Tensor:
    """Hazards' logits [rows, exits - 1] -> probability that none deeper is needed, [rows, exits - 1], ascending."""
    return -torch.expm1(torch.nn.functional.logsigmoid(-logits).cumsum(1))
