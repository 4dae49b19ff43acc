"""From logits to tokens on the device: what crosses to the host are ids, or the few best logits of a row.

The definition is the sampler's (engine/sampler.py), random numbers included, so a seed gives the same tokens as on the
CPU up to the last bit of a float32 exponential:

    greedy             the argmax that the head has computed already
    top-k up to 64     the same among the k best logits, in the order of their ids
    other plain rows   weights, nucleus and inverse cumulative sum on the device, in float64 like the CPU's
    the rest           bias, penalties, grammar, log-probabilities: the row's logits go to the host

All but the last stay on the device too, where the next step's rows may start from them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sortserve.engine.cuda.forward import HeadOutput
from sortserve.engine.sampler import (
    MIN_TEMPERATURE,
    SampledToken,
    SamplingRow,
    draw,
    token_logprob,
    uniform,
)
from sortserve.kernels.gpu.sampling import MOST_K, top_k


@dataclass(frozen=True, slots=True)
class Sorted:
    """Which rows (numbers into `SamplingRow`s) are served how."""

    few: list[int]  # on the device among a few
    drawn: list[int]  # on the device
    whole: list[int]  # the row's logits go to the host


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens on their way. `tokens` must be called after the device has done what was launched."""

    tokens: Callable[[], list[SampledToken]]
    ids: Tensor  # int64 [rows of logits], on the device
    known: list[bool]  # by drawn row: whether its token is in `ids`, at the row of its logits


class DeviceSampler:
    """Draws a token for each row. `launch` waits for nothing."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def launch(self, output: HeadOutput, places: Sequence[int], rows: Sequence[SamplingRow]) -> Drawn:
        """`places[i]` is the row of `output` that rows[i] draws from."""
        kinds = self._sort(rows)
        drawn = output.ids.clone()  # the output's are the next step's as well
        for chosen, draw_rows in ((kinds.few, self._draw_few), (kinds.drawn, _draw)):
            if chosen:
                index = _index([places[i] for i in chosen], drawn.device)
                drawn.index_copy_(0, index, draw_rows(output.logits.index_select(0, index), [rows[i] for i in chosen]))
        ids, logprobs = _to_host(drawn), _to_host(output.logprobs)
        whole = _to_host(_rows(output.logits, [places[i] for i in kinds.whole]).float()) if kinds.whole else None

        def tokens() -> list[SampledToken]:
            finite = np.isfinite(logprobs.numpy())
            if not finite.all():
                raise AssertionError(f"logits of rows {np.flatnonzero(~finite).tolist()} are not finite")
            found = ids.tolist()
            result: list[SampledToken] = [(found[place], None) for place in places]
            for number, i in enumerate(kinds.whole):
                assert whole is not None
                result[i] = _on_host(whole[number].numpy(), rows[i])
            return result

        looked_at = set(kinds.whole)
        return Drawn(tokens, drawn, [i not in looked_at for i in range(len(rows))])

    def _sort(self, rows: Sequence[SamplingRow]) -> Sorted:
        kinds = Sorted([], [], [])
        for i, row in enumerate(rows):
            params = row.params
            if not params.plain or params.logprobs is not None:
                kinds.whole.append(i)
            elif not params.greedy:
                (kinds.few if 0 < params.top_k <= MOST_K else kinds.drawn).append(i)
        return kinds

    def _draw_few(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """Among the k best of each row, in the order of their ids, as the CPU draws."""
        values, ids = top_k(logits, min(max(row.params.top_k for row in rows), self._vocab_size))
        order = ids.argsort(dim=1)
        values, ids = values.float().gather(1, order), ids.gather(1, order)
        places = draw_on_device(values, _parameters(rows, values), narrowed=True)
        return ids.gather(1, places[:, None])[:, 0].long()


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Rows that are drawn among all tokens: temperature, top-k, top-p, min-p and one uniform number each."""
    narrowed = any(row.params.top_p < 1.0 or 0 < row.params.top_k < logits.shape[1] for row in rows)
    return draw_on_device(logits.float(), _parameters(rows, logits), narrowed=narrowed)


def _parameters(rows: Sequence[SamplingRow], logits: Tensor) -> Tensor:
    """What `draw_on_device` takes for rows of these logits."""
    return torch.tensor(
        [
            (
                max(row.params.temperature, MIN_TEMPERATURE),
                row.params.top_p,
                row.params.min_p,
                uniform(row.seed, row.position),
                row.params.top_k if 0 < row.params.top_k < logits.shape[1] else logits.shape[1],
            )
            for row in rows
        ],
        dtype=torch.float64,
        pin_memory=logits.is_cuda,
    ).to(logits.device, non_blocking=True)


def draw_on_device(logits: Tensor, parameters: Tensor, *, narrowed: bool) -> Tensor:
    """float32 logits [rows, vocab] and float64 (temperature, top_p, min_p, uniform, top_k) [rows, 5] -> ids [rows].

    `narrowed`: some row has a top-p or a top-k; only then are the rows sorted.
    """
    temperature, top_p, min_p, share, count = (column[:, None] for column in parameters.unbind(1))
    weights = ((logits - logits.amax(1, keepdim=True)) / temperature.float()).exp()
    if narrowed:
        # stable: among equal logits the smaller id is the better
        order = logits.argsort(dim=1, descending=True, stable=True)
        ranked = weights.gather(1, order)
        rank = torch.arange(logits.shape[1], device=logits.device)
        ranked = ranked * (rank < count)
        cumulative = ranked.double().cumsum(1)
        # up to and with the first token whose cumulative share reaches top_p
        reached = torch.nn.functional.pad(cumulative[:, :-1], (1, 0)) >= top_p * cumulative[:, -1:]
        ranked = ranked.masked_fill(reached & (top_p < 1.0), 0.0)
        weights = torch.zeros_like(weights).scatter_(1, order, ranked)
    weights = weights.masked_fill(weights < min_p.float(), 0.0)
    cumulative = weights.double().cumsum(1)
    total = cumulative[:, -1:]
    # the largest shares can round to the total; never a token of weight 0
    target = torch.minimum(share * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _rows(logits: Tensor, places: Sequence[int]) -> Tensor:
    """Those rows."""
    if list(places) == list(range(logits.shape[0])):
        return logits
    return logits.index_select(0, _index(places, logits.device))


def _index(places: Sequence[int], device: torch.device) -> Tensor:
    """A list of numbers on the device, without waiting: it goes over from pinned memory."""
    return torch.tensor(list(places), pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, on its way: to be read after the device has come so far."""
    if not tensor.is_cuda:
        return tensor.clone()
    target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return target.copy_(tensor, non_blocking=True)


def _on_host(logits: np.ndarray, row: SamplingRow) -> SampledToken:
    token = draw(logits, row)
    return token, None if row.params.logprobs is None else token_logprob(logits, token, row.params.logprobs)
