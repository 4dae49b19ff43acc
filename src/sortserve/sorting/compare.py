"""Sub-models against the full model on held-out texts: loss, top-1 agreement and KL divergence, text by text.

Every row of logits of the full model is made once per batch and stands only while all sub-models are held against it.
All sums are kept per text, because the tokens of one text are not independent: intervals draw whole texts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.engine.ladder_file import Estimate, Figures
from sortserve.engine.submodel import SubModel
from sortserve.sorting.decoder import Decoder, SharedRun
from sortserve.sorting.texts import Batch, Domain, batches

Floats = NDArray[np.float64]
Progress = Callable[[str], None]
ROWS = 128  # logits at a time: 78 MB of a 150k vocabulary in float32
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Sums:
    """Per text of a domain: nats of loss, tokens where both models agree, nats of KL divergence, tokens scored."""

    loss: Floats
    agreed: Floats
    kl: Floats
    tokens: Floats

    @classmethod
    def zeros(cls, num_texts: int) -> "Sums":
        """Nothing counted yet."""
        return cls(*(np.zeros(num_texts) for _ in range(4)))

    def figures(self, seed: int = 0) -> Figures:
        """Means per token with 95 % percentile bootstrap intervals over texts."""
        draws = draw_texts(len(self.tokens), seed)
        loss, agreed, kl = (_estimate(sums, self.tokens, draws) for sums in (self.loss, self.agreed, self.kl))
        return Figures(loss, agreed, kl, int(self.tokens.sum()))


@dataclass(frozen=True)
class Variant:
    """What is compared: one sub-model throughout, or another one for the prompt's tokens."""

    submodel: SubModel
    prompt: SubModel | None = None


def compare(
    decoder: Decoder,
    domains: Sequence[Domain],
    variants: Sequence[Variant],
    *,
    batch_tokens: int = 512,
    progress: Progress | None = None,
) -> list[dict[str, Sums]]:
    """Sums of each variant by domain, in the variants' order."""
    results = [{domain.name: Sums.zeros(len(domain.texts)) for domain in domains} for _ in variants]
    order = sorted(range(len(variants)), key=lambda place: _sort_key(variants[place]))
    done, total = 0, sum(domain.num_scored for domain in domains)
    with torch.inference_mode():
        for domain in domains:
            for batch in batches(domain, batch_tokens):
                _compare_batch(decoder, batch, variants, order, [result[domain.name] for result in results])
                done += int(batch.scored.sum())
                if progress is not None:
                    progress(f"{domain.name}: {done} of {total} tokens, {len(variants)} sub-models")
    return results


def predicting(batch: Batch) -> Tensor:
    """Rows whose logits are about a scored token: each is the one before it, bool [texts, tokens]."""
    rows = batch.scored.roll(-1, 1)
    rows[:, -1] = False
    return rows


def draw_texts(num_texts: int, seed: int = 0) -> NDArray[np.int64]:
    """Bootstrap draws of texts, [DRAWS, texts]; the same for the same seed, so that two sub-models are drawn in pairs."""
    return np.random.default_rng(seed).integers(0, num_texts, (DRAWS, num_texts))


def _sort_key(variant: Variant) -> tuple[bool, tuple[tuple[int, bool], ...]]:
    # neighbours share as many first layers as there are to share; pairs share nothing
    return variant.prompt is not None, variant.submodel.settings(0, variant.submodel.depth)


def _compare_batch(
    decoder: Decoder, batch: Batch, variants: Sequence[Variant], order: Sequence[int], sums: Sequence[Sums]
) -> None:
    rows = predicting(batch)
    targets = batch.tokens[batch.scored]
    owners = np.repeat(np.array(batch.places), batch.scored.sum(1).numpy())  # text of each scored token
    shared = SharedRun(decoder, batch.tokens)
    full = shared.run(SubModel.full(decoder.config.shape), keep=False)[rows]
    hidden: dict[int, Tensor] = {}
    for place in order:
        variant = variants[place]
        if variant.prompt is None:
            hidden[place] = shared.run(variant.submodel)[rows]
        else:
            hidden[place] = decoder.run_pair(batch.tokens, batch.is_prompt, variant.prompt, variant.submodel)[rows]
    for start in range(0, len(targets), ROWS):
        part = slice(start, start + ROWS)
        reference = decoder.logits(full[part]).log_softmax(-1)
        for place, states in hidden.items():
            logprobs = decoder.logits(states[part]).log_softmax(-1)
            loss = -logprobs.gather(1, targets[part, None])[:, 0]
            agreed = logprobs.argmax(-1) == reference.argmax(-1)
            kl = kl_divergence(reference, logprobs)
            for into, values in (
                (sums[place].loss, loss),
                (sums[place].agreed, agreed),
                (sums[place].kl, kl),
                (sums[place].tokens, torch.ones_like(loss)),
            ):
                np.add.at(into, owners[part], values.double().numpy())


def kl_divergence(reference: Tensor, logprobs: Tensor) -> Tensor:
    """KL(reference || other) per row of log-probabilities [rows, vocab], in nats; never under 0 by rounding."""
    return (reference.exp() * (reference - logprobs)).sum(-1).clamp_min(0)


def _estimate(sums: Floats, tokens: Floats, draws: NDArray[np.int64]) -> Estimate:
    value = float(sums.sum() / tokens.sum())
    low, high = np.quantile(sums[draws].sum(1) / tokens[draws].sum(1), [0.025, 0.975])
    return Estimate(round(value, 6), round(min(float(low), value), 6), round(max(float(high), value), 6))
