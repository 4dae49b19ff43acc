"""From candidates to a measured ladder: figures by domain, pairs, task scores, times, and what is kept."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sortserve.engine.config import load_model_config
from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.ladder_file import Score
from sortserve.engine.llm import LLM
from sortserve.engine.submodel import ModelShape, SubModel
from sortserve.sorting import provenance
from sortserve.sorting.answers import Task, score
from sortserve.sorting.compare import Sums, Variant, compare
from sortserve.sorting.decoder import Decoder
from sortserve.sorting.folder import new_file
from sortserve.sorting.layer_drop import measure_similarity
from sortserve.sorting.lm_eval import LmEval
from sortserve.sorting.plot import quality_plot
from sortserve.sorting.quality import BY_LOSS, Result, build_ladder
from sortserve.sorting.texts import Domain, batches
from sortserve.sorting.timing import token_milliseconds

Progress = Callable[[str], None]
MAX_MODEL_LEN = 2048  # of questions with their answers
IMPORTANCE_TOKENS = 128  # of each domain


@dataclass(frozen=True)
class Candidate:
    """A sub-model that may come into the ladder, and the method that found it."""

    submodel: SubModel
    method: str = ""
    id: str | None = None


@dataclass(frozen=True)
class Extras:
    """What is measured beyond text, of the entries that are kept: needs the model folder that will be served."""

    tasks: tuple[Task, ...] = ()
    lm_eval: LmEval | None = None
    time_tokens: bool = False
    dtype: str = "auto"

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.tasks) or self.lm_eval is not None or self.time_tokens


@dataclass(frozen=True)
class Measurement:
    """A ladder, and the entries that were measured and left out as dominated."""

    ladder: Ladder
    left_out: tuple[Entry, ...]

    def write(self, ladder_path: Path, title: str) -> None:
        """ladder.json, and beside it the plot; each is written whole or not at all."""
        with new_file(ladder_path) as path:
            self.ladder.dump(path)
        with new_file(ladder_path.with_suffix(".svg")) as path:
            path.write_text(quality_plot(self.ladder, self.left_out, title), encoding="utf-8")


def measure(
    decoder: Decoder,
    domains: Sequence[Domain],
    candidates: Sequence[Candidate],
    *,
    quality: str = BY_LOSS,
    pairs: int = 0,
    extras: Extras | None = None,
    folder: Path | None = None,
    keep_dominated: bool = False,
    progress: Progress | None = None,
) -> Measurement:
    """Measure the candidates and the full model. `pairs`: so many narrower entries, spread over the ladder, are measured
    with the full model as prompt and answer of one another. `folder` is what `extras` run on."""
    started = time.monotonic()
    shape = decoder.config.shape
    full = SubModel.full(shape)
    chosen = {candidate.submodel: candidate for candidate in [*candidates, Candidate(full, "", None)]}
    figures = compare(decoder, domains, [Variant(submodel) for submodel in chosen], progress=progress)
    results = [
        Result(one.submodel, one.method, sums, {}, None, one.id)
        for one, sums in zip(chosen.values(), figures, strict=True)
    ]
    everything = build_ladder(shape, results, None, keep_dominated=True)
    ladder = build_ladder(shape, results, None, keep_dominated=keep_dominated)
    if extras is not None and extras.wanted:
        assert folder is not None
        kept = {entry.submodel: entry.id for entry in (everything if quality != BY_LOSS else ladder).entries}
        results = [replace(result, id=kept[result.submodel]) for result in results if result.submodel in kept]
        results = _measure_extras(shape, results, extras, folder, progress)
        ladder = build_ladder(shape, results, None, quality=quality, keep_dominated=keep_dominated)
    told = _measure_pairs(decoder, domains, ladder, pairs, progress)
    source = provenance.measured(domains, quality=quality, seconds=time.monotonic() - started)
    ladder = build_ladder(
        shape,
        results,
        source,
        quality=quality,
        pairs=told,
        keep_dominated=keep_dominated,
        layer_importance=_layer_importance(decoder, domains),
    )
    kept_submodels = {entry.submodel for entry in ladder.entries}
    return Measurement(ladder, tuple(entry for entry in everything.entries if entry.submodel not in kept_submodels))


def _layer_importance(decoder: Decoder, domains: Sequence[Domain]) -> tuple[float, ...]:
    """LIM's, by a few texts of each domain: layers to keep in fewer bits."""
    texts = (batch for domain in domains for batch in batches(domain.first(IMPORTANCE_TOKENS), IMPORTANCE_TOKENS))
    return measure_similarity(decoder, texts).lim


def _measure_pairs(
    decoder: Decoder, domains: Sequence[Domain], ladder: Ladder, count: int, progress: Progress | None
) -> list[tuple[str, str, Mapping[str, Sums]]]:
    """(prompt id, answer id, sums by domain), on the domains whose texts have a prompt."""
    prompted = [domain for domain in domains if any(text.num_prompt > 1 for text in domain.texts)]
    whole = ladder.entries[-1]
    others = [entry for entry in ladder.entries[:-1] if entry.submodel.depth == whole.submodel.depth]
    if count < len(others):
        others = [others[round((place + 0.5) * len(others) / count - 0.5)] for place in range(count)]
    named = [pair for entry in others for pair in ((entry, whole), (whole, entry))]
    if not prompted or not named:
        return []
    variants = [Variant(answer.submodel, prompt.submodel) for prompt, answer in named]
    figures = compare(decoder, prompted, variants, progress=progress)
    return [(prompt.id, answer.id, sums) for (prompt, answer), sums in zip(named, figures, strict=True)]


def _measure_extras(
    shape: ModelShape, results: Sequence[Result], extras: Extras, folder: Path, progress: Progress | None
) -> list[Result]:
    """The results with task scores and times, measured by the engine itself."""
    with _ladder_file(shape, results) as path:
        scores: dict[str, dict[str, Score]] = {str(result.id): {} for result in results}
        times: dict[str, float] = {}
        if extras.tasks or extras.time_tokens:
            longest = min(MAX_MODEL_LEN, load_model_config(folder).max_context)
            llm = LLM(folder, ladder_path=path, dtype=extras.dtype, max_model_len=longest)
            if extras.time_tokens:
                times = token_milliseconds(llm, list(scores))
            for task in extras.tasks:
                for name, told in scores.items():
                    told[task.name] = score(llm, name, task, progress)
            del llm
        if extras.lm_eval is not None:
            for name, found in extras.lm_eval.scores(folder, path, list(scores), progress).items():
                scores[name] |= found
    return [replace(result, scores=scores[str(result.id)], token_ms=times.get(str(result.id))) for result in results]


@contextmanager
def _ladder_file(shape: ModelShape, results: Sequence[Result]) -> Iterator[Path]:
    """A ladder of the results by id, unmeasured, for the engine to load."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ladder.json"
        Ladder.of(shape, [Entry(str(result.id), result.submodel) for result in results]).dump(path)
        yield path
