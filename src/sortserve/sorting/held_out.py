"""Losses of every sub-model of a grid on held-out files, at the end of a run: what the run came to.

`sortserve ladder measure` measures what is served; this is the trainer's own word, on the openings of the files.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from sortserve.sorting.data import Texts, inputs_and_targets
from sortserve.sorting.losses import head_loss
from sortserve.sorting.nested import SubModels, exit_states

BATCH = 16  # windows at a time


@dataclass(frozen=True)
class HeldOut:
    """`nats` (depth, width) -> mean loss per token, over `tokens` tokens of `text_bytes` UTF-8 bytes."""

    nats: dict[tuple[int, int], float]
    tokens: int
    text_bytes: int

    def bits_per_byte(self, point: tuple[int, int]) -> float:
        """Comparable between tokenizers, unlike the loss."""
        return self.nats[point] * self.tokens / self.text_bytes / float(np.log(2))


def measure(
    model: Any,
    tokenizer: Tokenizer,
    texts: Texts,
    bos: int | None,
    exits: tuple[int, ...],
    widths: tuple[int, ...],
    *,
    window: int,
    per_file: int,
) -> HeldOut | None:
    """Of the first `per_file` tokens of each held-out file; None if nothing is held out or all is too short."""
    windows, text_bytes = [], 0
    for documents in texts.held_out.values():
        text = "\n\n".join(documents)[: 8 * per_file]
        found = tokenizer.encode(text, add_special_tokens=False)
        usable = min(len(found.ids), per_file) // window * window
        if usable:
            windows.append(torch.tensor(found.ids[:usable]).reshape(-1, window))
            # without a BOS the first token of a window is no target, and is too small a part to be taken out of the bytes
            text_bytes += len(text[: found.offsets[usable - 1][1]].encode())
    if not windows:
        return None
    everything = torch.cat(windows)
    device = model.lm_head.weight.device
    sums: dict[tuple[int, int], float] = {}
    with torch.inference_mode():
        for width in widths:
            for part in torch.split(everything, BATCH):
                inputs, targets = inputs_and_targets(part.to(device), bos)
                states = exit_states(model, inputs, SubModels(exits, width)).flatten(1, 2)
                loss = head_loss(states, model.lm_head.weight, targets.reshape(-1), [1.0] * len(exits))
                for depth, value in zip(exits, loss.each.tolist(), strict=True):
                    sums[depth, width] = sums.get((depth, width), 0.0) + value * targets.numel()
    num_targets = everything.numel() - (0 if bos is not None else len(everything))
    return HeldOut({point: total / num_targets for point, total in sums.items()}, num_targets, text_bytes)
