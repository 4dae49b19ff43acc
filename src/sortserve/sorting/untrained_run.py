"""Sorting without training, end to end: importance, permutation, searches, measuring, a folder to serve.

Weights are only permuted. The time given is spent in turn: importance and widths take what their texts take, searches for
sub-layers to drop share what is left up to 0.65 of all, measuring takes the rest; `Plan` says how much text each looks at.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sortserve.engine.errors import SortingError
from sortserve.engine.ladder import Ladder
from sortserve.engine.submodel import ModelShape, SubModel
from sortserve.engine.text import Tokenizer
from sortserve.sorting import layer_drop, widths
from sortserve.sorting.compare import kl_divergence
from sortserve.sorting.decoder import Decoder
from sortserve.sorting.fitness import KLFitness
from sortserve.sorting.folder import check_target, new_folder
from sortserve.sorting.importance import measure_importance
from sortserve.sorting.machine import dtype_of, keep_freed_memory
from sortserve.sorting.measuring import Candidate, Measurement, measure
from sortserve.sorting.permute import folder_bytes, write_permuted
from sortserve.sorting.search import Settings, Space, evolve
from sortserve.sorting.slopes import Slopes
from sortserve.sorting.texts import Batch, Domain, batches, built_in, load_domains, mixed_batches

Progress = Callable[[str], None]
SEARCH_SHARE = 0.65  # of the time: what is after that is for measuring and writing
NARROWEST = 0.8  # of a budget: no layer is narrower, and there slopes are measured
SLOPE_TOKENS = 512  # of each domain: a pass over 1,600 tokens takes 45 s of one core on the 0.5B model
SELECTION_TOKENS = 384  # per source, on which widths by layer are held against one width
SELECTION_STRIDE = 2  # every second row gets logits, of which 0.3 MB each stay in memory
SEARCH_TOKENS = 96  # of each text that searches look at
SEARCH_ROUNDS = (1, 3)  # batches of one text per domain in the first and the last round
SEARCH_STRIDE = 3  # every third row gets logits
LARGEST_BATCH = 512  # tokens; bounds the memory of the pass back


@dataclass(frozen=True)
class Plan:
    """The arguments, resolved. Shares are in [0, 1); empty sources mean the texts of the package."""

    model: Path
    out: Path
    calibration: tuple[str, ...] = ()
    calibration_tokens: int = 768  # per source; SELECTION_TOKENS more are taken where there is more
    held_out: tuple[str, ...] = ()
    held_out_tokens: int = 512  # per source
    window: int = 256
    budgets: tuple[float, ...] = (0.85, 0.7, 0.55)  # of FFN neurons
    levels: tuple[float, ...] = ()  # widths of a layer, besides 1; empty: any multiple of 128, of each layer its own
    drop: tuple[float, ...] = (0.125,)  # of sub-layers
    methods: tuple[str, ...] = ("widths", "evopress")
    pairs: int = 2
    seconds: float = 720.0
    seed: int = 0
    dtype: str = "auto"


@dataclass(frozen=True)
class Calibration:
    """Texts that importance, slopes and searches look at, and others of the same sources to choose by."""

    seen: list[Domain]
    unseen: list[Domain]


def sort_untrained(plan: Plan, progress: Progress) -> Measurement:
    """Do all of it and write `plan.out`. Raises StartupError; then nothing was written."""
    started = time.monotonic()
    check_target(plan.out, folder_bytes(plan.model) if plan.model.is_dir() else 0)
    keep_freed_memory()
    decoder = Decoder.load(plan.model, dtype_of(plan.model, plan.dtype), plan.window)
    calibration, held_out = _texts(plan)
    progress(
        f"loaded; calibration {_told(calibration.seen)}; to choose by {_told(calibration.unseen)}; "
        f"held out {_told(held_out)}"
    )
    data = [batch for domain in calibration.seen for batch in batches(domain, LARGEST_BATCH)]
    orders = measure_importance(decoder, data, plan.seed).order()
    _permute(decoder, orders, data[0], progress)
    candidates = find_candidates(
        decoder,
        calibration,
        plan,
        until=started + SEARCH_SHARE * plan.seconds,
        progress=progress,
    )
    candidates += exits_of(plan.model, decoder.config.shape)
    progress(f"searched; measuring {len(candidates)} sub-models")
    found = measure(decoder, held_out, candidates, pairs=plan.pairs, progress=progress)
    with new_folder(plan.out, needed_bytes=folder_bytes(plan.model)) as folder:
        write_permuted(plan.model, folder, decoder.config, orders)
        found.write(folder / "ladder.json", f"{plan.out.name}: quality against cost")
    progress(f"written, {time.monotonic() - started:.0f} s in all")
    return found


def exits_of(model: Path, shape: ModelShape) -> list[Candidate]:
    """What the model's own ladder offers at full width, such as trained exits. Its narrower entries meant other neurons."""
    path = model / "ladder.json"
    if not path.is_file():
        return []
    entries = Ladder.load(path, shape).entries
    return [
        Candidate(entry.submodel, entry.method, entry.id)
        for entry in entries
        if set(entry.submodel.widths) <= {0, shape.ffn_width}
    ]


def find_candidates(
    decoder: Decoder,
    calibration: Calibration,
    plan: Plan,
    *,
    until: float,
    progress: Progress,
) -> list[Candidate]:
    """Sub-models by every method of the plan; searches share the time until `until`. Neurons must be sorted."""
    candidates = _width_candidates(decoder, calibration, plan, progress) if "widths" in plan.methods else []
    texts = mixed_batches(calibration.seen, SEARCH_TOKENS, max(SEARCH_ROUNDS))
    dropping, jobs = _drop_candidates(decoder, texts, plan)
    candidates += dropping
    if not jobs:
        return candidates
    fitness = KLFitness(decoder, texts, [min(count, len(texts)) for count in SEARCH_ROUNDS], SEARCH_STRIDE)
    space = Space((0, decoder.config.shape.ffn_width), decoder.config.shape.num_layers, drop_attention=True)
    for place, starts in enumerate(jobs):
        seconds = max(0.0, until - time.monotonic()) / (len(jobs) - place)
        settings = Settings(200, 6, (2,), seed=plan.seed, seconds=seconds)
        found = evolve(space, starts, fitness, settings, partial(_tell, progress, "evopress"), fitness.rebase)
        told = ", ".join(f"{value:.4f}" for value in found.start_fitness)
        progress(f"evopress: KL {found.fitness:.4f} after {found.generations} generations, starts {told}")
        candidates.append(Candidate(found.submodel, "evopress"))
    return candidates


def _width_candidates(decoder: Decoder, calibration: Calibration, plan: Plan, progress: Progress) -> list[Candidate]:
    """Per budget the better one of widths by slopes and one width for all layers, on text that slopes did not see."""
    shape = decoder.config.shape
    budgets = [(int(share * shape.num_layers * shape.ffn_width), _levels(shape, plan, share)) for share in plan.budgets]
    for budget, levels in budgets:
        if budget < levels[0] * shape.num_layers:
            raise SortingError(f"a budget of {budget} neurons is under the narrowest level, {levels[0]} in each layer")
    data = [batch for domain in calibration.seen for batch in batches(domain.split(SLOPE_TOKENS)[0], LARGEST_BATCH)]
    slopes = Slopes(decoder, data)
    unseen = [batch for domain in calibration.unseen for batch in batches(domain, LARGEST_BATCH)]
    fitness = KLFitness(decoder, unseen, stride=SELECTION_STRIDE)
    candidates = []
    for budget, levels in budgets:
        named = {"by layer": widths.allocate(slopes.losses(levels), levels, budget)}
        even = widths.uniform(shape, budget)
        if even.widths[0] in levels:
            named["one width"] = even
        lost = {name: fitness(submodel) for name, submodel in named.items()}
        best = min(lost, key=lost.__getitem__)
        told = ", ".join(f"{name} {value:.4f}" for name, value in lost.items())
        progress(f"{budget} neurons: {best}, KL on {fitness.num_rows} rows: {told}")
        candidates.append(Candidate(named[best], "widths"))
    return candidates


def _levels(shape: ModelShape, plan: Plan, share: float) -> tuple[int, ...]:
    """The widths that a layer may have. More than three budgets share few, so that a layer has at most four blocks."""
    if plan.levels or len(plan.budgets) > 3:
        return widths.levels(shape, plan.levels or (0.25, 0.5, 0.75))
    return widths.fine_levels(shape, NARROWEST * share)


def _drop_candidates(
    decoder: Decoder, texts: Sequence[Batch], plan: Plan
) -> tuple[list[Candidate], list[list[SubModel]]]:
    """What the methods without search drop, and where the searches at the same cost start."""
    shape = decoder.config.shape
    if not set(plan.methods) & {"evopress", "uls", "llm-drop", "lim", "zd"}:
        return [], []
    similarity = layer_drop.measure_similarity(decoder, texts)
    candidates, jobs = [], []
    for share in plan.drop:
        count = round(shape.num_layers * share)
        if not 0 < count <= shape.num_layers - 2:
            raise SortingError(f"dropping {share:.1%} of {shape.num_layers} layers' sub-layers is {count} of each kind")
        by_method = {
            "uls": layer_drop.unified_layer_skipping(shape.num_layers, shape.ffn_width, shape.num_layers - count),
            "llm-drop": layer_drop.llm_drop(similarity, shape.ffn_width, attention=count, ffn=count),
            "lim": layer_drop.drop_layers(similarity.lim, shape.ffn_width, count),
        }
        if "zd" in plan.methods:
            by_method["zd"] = layer_drop.drop_layers(layer_drop.zd(decoder), shape.ffn_width, count)
        candidates += [Candidate(by_method[name], name) for name in by_method if name in plan.methods]
        if "llm-drop" in plan.methods:
            candidates.append(
                Candidate(layer_drop.llm_drop(similarity, shape.ffn_width, attention=2 * count), "llm-drop")
            )
            candidates.append(Candidate(layer_drop.llm_drop(similarity, shape.ffn_width, joint=2 * count), "llm-drop"))
        if "evopress" in plan.methods:
            jobs.append(list(by_method.values()))
    return candidates, jobs


def _texts(plan: Plan) -> tuple[Calibration, list[Domain]]:
    tokenizer = Tokenizer.load(plan.model)
    calibration = load_domains(
        plan.calibration or built_in("calibration"),
        tokenizer,
        window=plan.window,
        tokens=plan.calibration_tokens + SELECTION_TOKENS,
        seed=plan.seed,
    )
    held_out = load_domains(
        plan.held_out or built_in("held_out"),
        tokenizer,
        window=plan.window,
        tokens=plan.held_out_tokens,
        seed=plan.seed,
    )
    seen = {text.tokens for domain in calibration for text in domain.texts}
    if any(text.tokens in seen for domain in held_out for text in domain.texts):
        raise SortingError(
            "a held-out text is among the calibration texts: figures on it would flatter; give other sources"
        )
    split = [domain.split(plan.calibration_tokens) for domain in calibration]
    unseen = [rest for _, rest in split if rest.texts]
    return Calibration([first for first, _ in split], unseen or calibration), held_out


def _permute(decoder: Decoder, orders: Sequence[torch.Tensor], batch: Batch, progress: Progress) -> None:
    """Sort the decoder's neurons, and tell how little that changed: sums are only added in another order."""
    full = SubModel.full(decoder.config.shape)
    rows = slice(None, 64)
    with torch.no_grad():  # tensors made in inference mode could not be differentiated through
        before = decoder.logits(decoder.run(batch.tokens[:1], full)[0, rows]).log_softmax(-1)
        for layer, order in zip(decoder.layers, orders, strict=True):
            assert bool((order.sort().values == torch.arange(len(order))).all()), "not a permutation"
            layer.permute_ffn(order)
        after = decoder.logits(decoder.run(batch.tokens[:1], full)[0, rows]).log_softmax(-1)
    kl = float(kl_divergence(before, after).mean())
    same = float((before.argmax(-1) == after.argmax(-1)).float().mean())
    progress(f"neurons sorted; the full model before and after: KL {kl:.2e}, same likeliest token {same:.1%}")


def _tell(progress: Progress, job: str, line: str) -> None:
    progress(f"{job}: {line}")


def _told(domains: Sequence[Domain]) -> str:
    return ", ".join(f"{domain.name} {domain.num_scored}" for domain in domains) + " tokens"
