"""What the switching mechanism costs, and what a refill costs.

(i) every request changes width every step under `kv: reuse`; (ii) the batch is redrawn each step from requests pinned to
different depths; each against a constant batch with the same rows per segment and the same mean width. (iii) alternating
half and full depth, exactly, against a prediction that counts the refills. (iv) refill of 256 tokens from half depth
against a full prefill of them.
"""

from collections.abc import Callable
from pathlib import Path

from benchmarks.common import Driver, alternate, grid_ladder, median, paired_ratio, report
from sortserve.engine.config import load_model_config

CONTEXT = 64
BATCH = 8
ROUNDS = 9
STEPS = 8


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
    """Half of the rows wide, half narrow; constant, or all of them swapped at every step."""
    wide, narrow = driver.place(f"d{layers}"), driver.place(f"d{layers}-w50")

    def seconds(swap: bool) -> Callable[[], float]:
        def measure() -> float:
            driver.clear()
            ids = [driver.submit(CONTEXT, STEPS + 6, wide) for _ in range(BATCH)]
            driver.catch_up()
            times = []
            for number in range(STEPS + 2):
                for position, request_id in enumerate(ids):
                    odd = position % 2 == (number % 2 if swap else 0)
                    driver.policy.places[request_id] = wide if odd else narrow
                times.append(driver.step()[0])
            return median(times[2:])

        return measure

    constant, swapped = alternate([seconds(False), seconds(True)], ROUNDS)
    ratio = paired_ratio(swapped, constant)
    print(
        f"(i)   constant {1e3 * median(constant):.1f} ms, widths swapped every step {1e3 * median(swapped):.1f}: {ratio:.3f}"
    )
    return ratio


def _redrawn(driver: Driver, depths: list[int]) -> float:
    """Two requests of each depth run, the same ones every step or two of four, in turn; the others sit out."""
    places = [driver.place(f"d{depth}") for depth in depths for _ in range(2)]

    def seconds(groups: int) -> Callable[[], float]:
        def measure() -> float:
            driver.clear()
            batches = [[driver.submit(CONTEXT, STEPS + 6, place, pinned=True) for place in places] for _ in range(2)]
            driver.catch_up()
            times = []
            for number in range(STEPS + 2):
                running = batches[number % groups]
                driver.engine.scheduler.policy = _Only(set(running), dict(driver.policy.places))
                times.append(driver.step()[0])
            driver.engine.scheduler.policy = driver.policy
            return median(times[2:])

        return measure

    constant, redrawn = alternate([seconds(1), seconds(2)], ROUNDS)
    ratio = paired_ratio(redrawn, constant)
    print(
        f"(ii)  constant {1e3 * median(constant):.1f} ms, batch redrawn every step {1e3 * median(redrawn):.1f}: {ratio:.3f}"
    )
    return ratio


class _Only:
    """Requests outside the set sit the step out."""

    name = "only"

    def __init__(self, running: set[str], places: dict[str, int]) -> None:
        self._running, self._places = running, places

    def decide(self, view):  # type: ignore[no-untyped-def]
        """The set's requests on their places."""
        from sortserve.engine.policy import Choice

        return [
            Choice(self._places[request.id] if request.id in self._running else None, "fixed")
            for request in view.requests
        ]


def _alternating(driver: Driver, layers: int) -> float:
    """Steps at half depth (A) and full depth (B) in turn. A full step then refills one token per request from its state:
    2 rows in the upper half, where a constant full batch has 1. Predicted: the mean of a half-depth step and a step
    whose upper half runs twice the rows, taken as full(BATCH) + [full(2 BATCH) - half(2 BATCH)] - [full - half](BATCH)."""
    full, half = driver.place(f"d{layers}"), driver.place(f"d{layers // 2}")

    def constant(place: int, rows: int) -> Callable[[], float]:
        def measure() -> float:
            driver.clear()
            for _ in range(rows):
                driver.submit(CONTEXT, STEPS + 6, place, pinned=True)
            driver.catch_up()
            driver.step()
            return median(driver.step()[0] for _ in range(STEPS))

        return measure

    def alternating() -> float:
        driver.clear()
        ids = [driver.submit(CONTEXT, 2 * STEPS + 8, full) for _ in range(BATCH)]
        driver.catch_up()
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(2 * STEPS + 2):
            for request_id in ids:
                driver.policy.places[request_id] = full if number % 2 else half
            times[number % 2].append(driver.step()[0])
        return (median(times[0][1:]) + median(times[1][1:])) / 2

    runs = [
        alternating,
        constant(half, BATCH),
        constant(full, BATCH),
        constant(half, 2 * BATCH),
        constant(full, 2 * BATCH),
    ]
    measured, half_b, full_b, half_2b, full_2b = alternate(runs, ROUNDS)
    predicted = [(h + h + f2 - h2) / 2 for h, f, h2, f2 in zip(half_b, full_b, half_2b, full_2b, strict=True)]
    ratio = paired_ratio(measured, predicted)
    print(
        f"(iii) alternating {1e3 * median(measured):.1f} ms a step, predicted {1e3 * median(predicted):.1f}: {ratio:.3f} "
        f"(half {1e3 * median(half_b):.1f}, full {1e3 * median(full_b):.1f})"
    )
    return ratio


def _refill(driver: Driver, layers: int, num_tokens: int = 256) -> float:
    """Bring 256 tokens from half to full depth, or compute them from nothing; each with the next token's logits."""
    full, half = driver.place(f"d{layers}"), driver.place(f"d{layers // 2}")

    def refill() -> float:
        driver.clear()
        request_id = driver.submit(num_tokens, 8, half)
        driver.catch_up()
        driver.policy.places[request_id] = full
        return driver.step()[0]

    def prefill() -> float:
        driver.clear()
        driver.submit(num_tokens + 1, 8, full, pinned=True)
        return driver.step()[0]

    refills, prefills = alternate([refill, prefill], ROUNDS)
    driver.clear()
    ratio = paired_ratio(refills, prefills)
    print(
        f"(iv)  refill of 256 tokens {1e3 * median(refills):.0f} ms, prefill {1e3 * median(prefills):.0f}: {ratio:.3f}"
    )
    return ratio
