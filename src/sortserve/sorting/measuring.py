"""From candidates to a measured ladder: figures by domain, pairs, task scores, times, and what is kept."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.ladder_file import Pair, Score
from sortserve.engine.llm import LLM
from sortserve.engine.model_config import load_model_config
from sortserve.engine.submodel import SubModel
from sortserve.sorting import provenance
from sortserve.sorting.answers import Task
from sortserve.sorting.compare import Variant, compare
from sortserve.sorting.decoder import Decoder
from sortserve.sorting.folder import new_file
from sortserve.sorting.kept_scores import KeptScores
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
    unfinished: Path | None = (
        None  # file that keeps task scores as they come, for a run that goes on; None: none is kept
    )

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
    more = None
    if extras is not None and extras.wanted:
        assert folder is not None
        more = _Extra(folder, extras, progress)
        results = more.of_entries(results, everything if quality != BY_LOSS else ladder)
        ladder = build_ladder(shape, results, None, quality=quality, keep_dominated=keep_dominated)
    told = _measure_pairs(decoder, domains, ladder, pairs, progress)
    if more is not None:
        told = more.of_pairs(told, ladder)
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
    texts = (batch for domain in domains for batch in batches(domain.split(IMPORTANCE_TOKENS)[0], IMPORTANCE_TOKENS))
    return measure_similarity(decoder, texts).lim


def _measure_pairs(
    decoder: Decoder, domains: Sequence[Domain], ladder: Ladder, count: int, progress: Progress | None
) -> list[Pair]:
    """On the domains whose texts have a prompt."""
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
    return [
        Pair(prompt.id, answer.id, {name: one.figures() for name, one in sums.items()})
        for (prompt, answer), sums in zip(named, figures, strict=True)
    ]


class _Extra:
    """What the engine itself measures: task scores of entries and pairs, and times."""

    def __init__(self, folder: Path, extras: Extras, progress: Progress | None) -> None:
        self._folder, self._extras, self._progress = folder, extras, progress
        self._kept = KeptScores(extras.unfinished, folder, extras.dtype)

    def of_entries(self, results: Sequence[Result], ladder: Ladder) -> list[Result]:
        """The results that are in the ladder, by its ids, with their scores and times."""
        extras, entries = self._extras, {entry.submodel: entry for entry in ladder.entries}
        scores: dict[str, dict[str, Score]] = {entry.id: {} for entry in ladder.entries}
        times: dict[str, float] = {}
        if extras.tasks or extras.time_tokens:
            with self._engine(ladder) as llm:
                if extras.time_tokens:
                    times = token_milliseconds(llm, list(scores))
                for entry in ladder.entries:
                    scores[entry.id] = self._scores(llm, entry, entry)
        if extras.lm_eval is not None:
            with _ladder_file(ladder) as path:
                found = extras.lm_eval.scores(self._folder, path, list(scores), self._progress)
            scores = {name: told | found[name] for name, told in scores.items()}
        named = [(entries[one.submodel].id, one) for one in results if one.submodel in entries]
        return [replace(one, id=name, scores=scores[name], token_ms=times.get(name)) for name, one in named]

    def of_pairs(self, pairs: Sequence[Pair], ladder: Ladder) -> list[Pair]:
        """The pairs with their scores."""
        if not self._extras.tasks or not pairs:
            return list(pairs)
        entries = {entry.id: entry for entry in ladder.entries}
        with self._engine(ladder) as llm:
            scores = [self._scores(llm, entries[pair.prompt], entries[pair.answer]) for pair in pairs]
        return [msgspec.structs.replace(pair, scores=one) for pair, one in zip(pairs, scores, strict=True)]

    def _scores(self, llm: LLM, prompt: Entry, answer: Entry) -> dict[str, Score]:
        return {task.name: self._kept.score(llm, prompt, answer, task, self._progress) for task in self._extras.tasks}

    @contextmanager
    def _engine(self, ladder: Ladder) -> Iterator[LLM]:
        """Without warm-up: nothing is predicted for requests whose sub-model is given."""
        longest = min(MAX_MODEL_LEN, load_model_config(self._folder).max_context)
        with _ladder_file(ladder) as path:
            yield LLM(self._folder, ladder_path=path, dtype=self._extras.dtype, max_model_len=longest, warmup=False)


@contextmanager
def _ladder_file(ladder: Ladder) -> Iterator[Path]:
    """The ladder's sub-models by id, unmeasured, for the engine to load."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ladder.json"
        Ladder.of(ladder.shape, [Entry(entry.id, entry.submodel) for entry in ladder.entries]).dump(path)
        yield path
