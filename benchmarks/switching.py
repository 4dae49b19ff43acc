"""What the switching mechanism costs, and what a refill costs.

(i) every request changes width every step under `kv: reuse`; (ii) the batch is redrawn each step from requests pinned to
different depths; each against a constant batch with the same rows per segment and the same mean width. (iii) alternating
half and full depth, exactly, against a prediction that counts the refills. (iv) refill of 256 tokens from half depth
against a full prefill of them.
"""

import random
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import CONTEXT, Driver, alternate, grid_ladder, median, paired_ratio, report
from sortserve.engine.model_config import load_model_config

BATCH = 8
ROUNDS = 60
MAX_TOKENS = 2 * ROUNDS + 8


def run(model: Path) -> None:
    """Run all four."""
    layers = load_model_config(model).shape.num_layers
    depths = [layers // 4, layers // 2, layers * 3 // 4, layers]
    driver = Driver.load(model, grid_ladder(model, depths, (1.0, 0.5)), kv_bytes=1 << 30, max_step_tokens=512)
    figures: dict[str, object] = {"context": CONTEXT, "batch": BATCH}
    checks: dict[str, bool] = {}
    ratio = _widths(driver, layers)
    figures["width_switch_ratio"], checks["(i) width changes every step: at most 1.03x"] = ratio, ratio <= 1.03
    ratio = _redrawn(driver, depths)
    figures["redrawn_ratio"], checks["(ii) batch redrawn every step: at most 1.03x"] = ratio, ratio <= 1.03
    ratio = _alternating(driver, layers)
    figures["alternating_ratio"], checks["(iii) alternating depth: within 10 % of the prediction"] = (
        ratio,
        ratio <= 1.10,
    )
    ratio = _refill(driver, layers)
    figures["refill_ratio"], checks["(iv) refill of 256 tokens: at most 0.6x a prefill"] = ratio, ratio <= 0.6
    report("switching", figures, checks)


def _widths(driver: Driver, layers: int) -> float:
    """Two batches, half of the rows wide, half narrow: in one they stay so, in the other all swap at every step."""
    wide, narrow = driver.place(f"d{layers}"), driver.place(f"d{layers}-w50")
    constant = [driver.submit(CONTEXT, MAX_TOKENS, wide) for _ in range(BATCH)]
    swapped = [driver.submit(CONTEXT, MAX_TOKENS, wide) for _ in range(BATCH)]
    driver.catch_up()
    for position, request_id in enumerate(constant):
        driver.policy.places[request_id] = narrow if position % 2 else wide
    turn = 0

    def swap() -> float:
        nonlocal turn
        turn += 1
        for position, request_id in enumerate(swapped):
            driver.policy.places[request_id] = narrow if (position + turn) % 2 else wide
        return driver.step(swapped)

    times = alternate([lambda: driver.step(constant), swap], ROUNDS)
    return _told(driver, "(i)   constant", times[0], "widths swapped every step", times[1])


def _redrawn(driver: Driver, depths: list[int]) -> float:
    """Two requests of each depth: the same eight at every step, or a drawing of eight among sixteen."""
    places = [driver.place(f"d{depth}") for depth in depths for _ in range(2)]
    constant = driver.group(places, MAX_TOKENS)
    pool = [driver.group(places, MAX_TOKENS) for _ in range(2)]
    draw = random.Random(0)

    def drawn() -> float:
        return driver.step([draw.choice(pair) for pair in zip(*pool, strict=True)])

    times = alternate([lambda: driver.step(constant), drawn], ROUNDS)
    return _told(driver, "(ii)  constant", times[0], "batch redrawn every step", times[1])


def _alternating(driver: Driver, layers: int) -> float:
    """Steps at half depth and at full depth in turn. A full step refills one token per request from its state, so its
    upper half runs 2 x BATCH rows. Predicted: the mean of a half-depth step and of one that adds to it the difference
    of full and half depth at 2 x BATCH rows."""
    full, half = driver.place(f"d{layers}"), driver.place(f"d{layers // 2}")
    half_b, half_2b, full_2b = (
        driver.group([place] * count, MAX_TOKENS)
        for place, count in ((half, BATCH), (half, 2 * BATCH), (full, 2 * BATCH))
    )
    moving = [driver.submit(CONTEXT, MAX_TOKENS, full) for _ in range(BATCH)]
    driver.catch_up()

    def move(place: int) -> Callable[[], float]:
        def seconds() -> float:
            driver.policy.places.update(dict.fromkeys(moving, place))
            return driver.step(moving)

        return seconds

    # not in reverse order every other round: half and full must take turns
    times: list[list[float]] = [[] for _ in range(5)]
    runs: list[Callable[[], float]] = [
        move(half),
        lambda: driver.step(half_b),
        move(full),
        lambda: driver.step(half_2b),
        lambda: driver.step(full_2b),
    ]
    for _ in range(ROUNDS):
        for figures, seconds in zip(times, runs, strict=True):
            figures.append(seconds())
    driver.clear()
    down, half_seconds, up, half_2, full_2 = (median(figures[1:]) for figures in times)
    measured, predicted = (down + up) / 2, (2 * half_seconds + full_2 - half_2) / 2
    print(
        f"(iii) alternating {1e3 * measured:.1f} ms a step (half {1e3 * down:.1f}, full with refill {1e3 * up:.1f}), "
        f"predicted {1e3 * predicted:.1f}: {measured / predicted:.3f}"
    )
    return measured / predicted


def _refill(driver: Driver, layers: int, num_tokens: int = 256) -> float:
    """Bring 256 tokens from half to full depth, or compute them from nothing; each with the next token's logits."""
    full, half = driver.place(f"d{layers}"), driver.place(f"d{layers // 2}")

    def refill() -> float:
        request_id = driver.submit(num_tokens, 8, half)
        driver.catch_up()
        driver.policy.places[request_id] = full
        seconds = driver.step()
        driver.clear()
        return seconds

    def prefill() -> float:
        driver.submit(num_tokens + 1, 8, full, pinned=True)
        seconds = driver.step()
        driver.clear()
        return seconds

    refills, prefills = alternate([refill, prefill], 15)
    ratio = paired_ratio(refills, prefills)
    print(
        f"(iv)  refill of 256 tokens {1e3 * median(refills):.0f} ms, prefill {1e3 * median(prefills):.0f}: {ratio:.3f}"
    )
    return ratio


def _told(driver: Driver, name: str, a: list[float], other: str, b: list[float]) -> float:
    """Print two series and return the median ratio of their pairs."""
    driver.clear()
    ratio = median(b) / median(a)
    print(f"{name} {1e3 * median(a):.1f} ms, {other} {1e3 * median(b):.1f}: {ratio:.3f}")
    return ratio
