"""Training the depth head (`engine/depth_head.py`) of a ladder: collect, fit, calibrate, judge; three sets of text.

Of every token of a text it is known which exit the *next* prediction needs: the shallowest from which on all exits think
the same token likeliest as the full model. Each exit runs its dearest entry. The loss is the likelihood of that exit under
the hazards, -log(lambda_k) - sum over j < k of log(1 - lambda_j): what makes told probabilities true, where PALBERT's own
loss (expected task loss and a geometric prior) makes exits early. What is left of error is taken out by a slope and an
offset for every hazard, fitted on other text; the figures are from text that neither has seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sortserve.engine.depth_head import DepthHead, inner_width, within
from sortserve.engine.errors import SortingError
from sortserve.engine.ladder import Ladder
from sortserve.sorting.compare import ROWS
from sortserve.sorting.decoder import Decoder, SharedRun
from sortserve.sorting.texts import Domain, batches

Progress = Callable[[str], None]
BINS = 10
BATCH = 512
EPOCHS = 6
LEARNING_RATE = 2e-3
"""With fewer epochs the loss on held-out text of the bundled model was higher, with more it rose again."""


@dataclass(frozen=True)
class Samples:
    """Tokens with what they say of the next one. Rows of a text follow each other."""

    normed: Tensor  # bfloat16 [exits, tokens, hidden] after the final norm
    drawn: Tensor  # int64 [tokens] the text's token that follows: what is drawn, in a text
    needed: Tensor  # int64 [tokens] exit, from 0, that the prediction after that one needs

    def __len__(self) -> int:
        return len(self.drawn)


@dataclass(frozen=True)
class Judged:
    """A head on text that it was not fitted on, means over all exits whose states it reads."""

    loss: float  # nats a token
    loss_blind: float  # of the mean distribution of the very same text
    calibration_error: float


def collect(decoder: Decoder, ladder: Ladder, domains: Sequence[Domain], progress: Progress | None = None) -> Samples:
    """Run the dearest entry of each exit over all texts. Raises SortingError for a ladder of one exit, or no text."""
    if ladder.num_segments < 2:
        raise SortingError("the ladder has one exit only: there is no depth to choose; add entries of other depths")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    done, total = 0, sum(len(text.tokens) for domain in domains for text in domain.texts)
    with torch.inference_mode():
        for domain in domains:
            for batch in batches(domain, 2048):
                parts.append(_collect_batch(decoder, ladder, batch.tokens, batch.scored | batch.is_prompt))
                done += int((batch.scored | batch.is_prompt).sum())
                if progress is not None:
                    progress(f"{domain.name}: {done} of {total} tokens read at {ladder.num_segments} exits")
    normed, drawn, needed = zip(*parts, strict=True)
    samples = Samples(torch.cat(normed, 1), torch.cat(drawn), torch.cat(needed))
    if not len(samples):
        raise SortingError("no text of at least 3 tokens to fit the depth head on")
    return samples


def _collect_batch(decoder: Decoder, ladder: Ladder, tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shared = SharedRun(decoder, tokens)
    normed, best = [], []
    for place in ladder.dearest:
        states = shared.run(ladder.entries[place].submodel)
        normed.append(F.rms_norm(states, (states.shape[-1],), decoder.final_norm, decoder.config.rms_eps))
        rows = torch.split(states.flatten(0, 1), ROWS)
        best.append(torch.cat([decoder.logits(part).argmax(-1) for part in rows]).view(tokens.shape))
    needed = needed_exit(torch.stack(best))
    # the row at t draws token t + 1, whose own row makes the next prediction: both must be real
    usable = real[:, 1:]
    states = torch.stack(normed)[:, :, :-1][:, usable].bfloat16()
    return states, tokens[:, 1:][usable], needed[:, 1:][usable]


def needed_exit(best: Tensor) -> Tensor:
    """Likeliest tokens [exits, ...] -> the shallowest exit, from 0, from which on all agree with the deepest, [...]."""
    agree = (best == best[-1:]).long()
    return best.shape[0] - agree.flip(0).cumprod(0).sum(0)


def loss_of(logits: Tensor, needed: Tensor) -> Tensor:
    """Mean nats of the exits needed [rows] under hazards' logits [rows, exits - 1]."""
    goes_on = F.pad(F.logsigmoid(-logits).cumsum(1), (1, 0))
    stops = F.pad(F.logsigmoid(logits), (0, 1))  # the deepest exit stops whatever comes there
    return -(goes_on + stops).gather(1, needed[:, None]).mean()


def fit(
    decoder: Decoder,
    ladder: Ladder,
    samples: Samples,
    seed: int = 0,
    progress: Progress | None = None,
    epochs: int = EPOCHS,
) -> DepthHead:
    """One small network for each exit whose states are read; they share nothing but their inputs."""
    torch.manual_seed(seed)
    exits, hidden = ladder.num_segments, decoder.config.shape.hidden_size
    units = inner_width(ladder.shape, exits)
    # embeddings are far smaller than normed states: alike in size they learn alike fast, and the factor goes into W1
    scale = float(samples.normed[-1].float().std() / decoder.embedding.float().std())
    found = []
    for exit in range(exits):
        inner, hazard = torch.nn.Linear(2 * hidden, units), torch.nn.Linear(units, exits - 1)
        optimizer = torch.optim.AdamW([*inner.parameters(), *hazard.parameters()], weight_decay=1e-4)
        updates, number = epochs * ((len(samples) + BATCH - 1) // BATCH), 0
        for epoch in range(epochs):
            for rows in torch.split(torch.randperm(len(samples)), BATCH):
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * max(0.02, 1 - number / updates)
                number += 1
                drawn = decoder.embedding[samples.drawn[rows]].float() * scale
                inputs = torch.cat([samples.normed[exit, rows].float(), drawn], 1)
                loss = loss_of(hazard(inner(inputs).tanh()), samples.needed[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            if progress is not None:
                progress(f"exit {ladder.exits[exit]}: {epoch + 1} of {epochs} epochs, {loss.item():.3f} nats")
        weight = inner.weight.detach().clone()
        weight[:, hidden:] *= scale
        found.append((weight, inner.bias.detach(), hazard.weight.detach(), hazard.bias.detach()))
    return DepthHead(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def calibrate(head: DepthHead, decoder: Decoder, samples: Samples) -> DepthHead:
    """The head with a slope and an offset for each hazard that fit `samples` best (Platt's, on survival's likelihood)."""
    hazard, bias = [], []
    for exit in range(head.num_exits):
        logits = _logits(head, decoder, samples, exit)
        slope = torch.ones(head.num_exits - 1, requires_grad=True)
        offset = torch.zeros(head.num_exits - 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([slope, offset], max_iter=50, line_search_fn="strong_wolfe")

        def closure(
            logits: Tensor = logits,
            slope: Tensor = slope,
            offset: Tensor = offset,
            optimizer: torch.optim.LBFGS = optimizer,
        ) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(logits * slope + offset, samples.needed)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            hazard.append(head.hazard[exit] * slope[:, None])
            bias.append(head.hazard_bias[exit] * slope + offset)
    return DepthHead(head.inner, head.inner_bias, torch.stack(hazard), torch.stack(bias))


def judge(head: DepthHead, decoder: Decoder, samples: Samples) -> Judged:
    """Of the head as it is, on `samples`."""
    shares = torch.bincount(samples.needed, minlength=head.num_exits) / len(samples)
    blind = -float((shares * shares.clamp_min(1e-12).log()).sum())
    losses, errors = [], []
    for exit in range(head.num_exits):
        logits = _logits(head, decoder, samples, exit)
        losses.append(float(loss_of(logits, samples.needed)))
        told = within(logits)
        errors += [calibration_error(told[:, target], samples.needed <= target) for target in range(head.num_exits - 1)]
    return Judged(float(np.mean(losses)), blind, float(np.mean(errors)))


def calibration_error(told: Tensor, came: Tensor) -> float:
    """Mean distance of told probabilities [rows] from how often it came true, over bins of equally many rows."""
    order = told.argsort()
    bins = zip(told[order].tensor_split(BINS), came[order].tensor_split(BINS), strict=True)
    return float(sum(abs(float(p.sum() - c.sum())) for p, c in bins)) / len(told)


def _logits(head: DepthHead, decoder: Decoder, samples: Samples, exit: int) -> Tensor:
    with torch.no_grad():
        parts = range(0, len(samples), 4096)
        return torch.cat(
            [
                head.logits(
                    exit,
                    samples.normed[exit, start : start + 4096],
                    decoder.embedding[samples.drawn[start : start + 4096]],
                )
                for start in parts
            ]
        )
