"""How far a sub-model is from the full model on calibration text: the number that searches make small."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sortserve.engine.submodel import SubModel
from sortserve.sorting.compare import kl_divergence, predicting
from sortserve.sorting.decoder import Decoder, SharedRun
from sortserve.sorting.texts import Batch


class KLFitness:
    """Mean KL divergence from the full model, in nats per token, over some of the rows of some texts.

    Round r looks at `rounds[r]` batches, of each at every `stride`-th scored row: the head is a quarter and more of a
    forward pass, and neighbouring rows tell much the same. The full model's log-probabilities are kept in bfloat16
    (0.3 MB a row of a 150k vocabulary). What a sub-model shares with the base, from layer 0 on, is not run again.
    """

    def __init__(
        self, decoder: Decoder, batches: Sequence[Batch], rounds: Sequence[int] | None = None, stride: int = 1
    ) -> None:
        self._decoder = decoder
        self._rounds = tuple(rounds) if rounds is not None else (len(batches),)
        assert all(0 < count <= len(batches) for count in self._rounds), self._rounds
        self._texts: list[tuple[SharedRun, Tensor, Tensor]] = []
        full = SubModel.full(decoder.config.shape)
        with torch.inference_mode():
            for batch in batches[: max(self._rounds)]:
                places = predicting(batch).nonzero()[::stride]
                shared = SharedRun(decoder, batch.tokens)
                hidden = shared.run(full)[places[:, 0], places[:, 1]]
                logprobs = decoder.logits(hidden).log_softmax(-1).bfloat16()
                self._texts.append((shared, places, logprobs))

    @property
    def num_rows(self) -> int:
        """Rows looked at in the last round."""
        return sum(len(places) for _, places, _ in self._texts[: self._rounds[-1]])

    def rebase(self, submodel: SubModel) -> None:
        """Keep the layers of this sub-model for those to come to share."""
        with torch.inference_mode():
            for shared, _, _ in self._texts:
                shared.run(submodel)

    def __call__(self, submodel: SubModel, round_number: int = -1) -> float:
        """Mean KL of the sub-model on the round's text; the last round if none is named."""
        total, rows = 0.0, 0
        with torch.inference_mode():
            for shared, places, reference in self._texts[: self._rounds[round_number]]:
                hidden = shared.run(submodel, keep=False)[places[:, 0], places[:, 1]]
                logprobs = self._decoder.logits(hidden).log_softmax(-1)
                total += float(kl_divergence(reference.float(), logprobs).sum())
                rows += len(places)
        return total / rows
