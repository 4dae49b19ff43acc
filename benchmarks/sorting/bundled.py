"""The bundled model against the same architecture trained alone, in bits per byte on held-out books.

    sortserve sort --recipe src/sortserve/sorting/recipes/bundled.toml --data BOOKS --to SORTED --minutes 76
    sortserve sort --recipe src/sortserve/sorting/recipes/bundled.toml --data BOOKS --to ALONE --alone --updates N
    python -m benchmarks.sorting.bundled SORTED ALONE

Reads the `training.json` that each run left. Targets: the full model within 3 % of the one trained alone, half depth within
8 % and half width within 5 % of the full one, and no entry of the ladder worse than a cheaper one.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import report
from sortserve.engine.ladder import Ladder
from sortserve.engine.model_config import load_model_config
from sortserve.server.cli import BUNDLED


def main() -> None:
    """Compare, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sorting.bundled", description=__doc__)
    parser.add_argument("sorted", type=Path, help="folder of the sorted run")
    parser.add_argument("alone", type=Path, help="folder of the run without sub-models")
    asked = parser.parse_args()
    ours, alone = (json.loads((folder / "training.json").read_text()) for folder in (asked.sorted, asked.alone))
    shape = load_model_config(asked.sorted).shape
    bits = {name: each["bits_per_byte"] for name, each in ours["held_out"]["losses"].items()}
    full = bits[f"d{shape.num_layers}-w{shape.ffn_width}"]
    half_depth = bits[f"d{shape.num_layers // 2}-w{shape.ffn_width}"]
    half_width = bits[f"d{shape.num_layers}-w{shape.ffn_width // 2}"]
    [alone_bits] = [each["bits_per_byte"] for each in alone["held_out"]["losses"].values()]
    qualities = Ladder.load(BUNDLED / "ladder.json", load_model_config(BUNDLED).shape).qualities
    figures: dict[str, Any] = {
        "bits_per_byte": bits,
        "alone_bits_per_byte": alone_bits,
        "updates": {"sorted": ours["updates"], "alone": alone["updates"]},
        "full_over_alone": round(full / alone_bits, 4),
        "half_depth_over_full": round(half_depth / full, 4),
        "half_width_over_full": round(half_width / full, 4),
        "ladder_qualities": qualities,
    }
    for name in ("full_over_alone", "half_depth_over_full", "half_width_over_full"):
        print(f"{name.replace('_', ' ')}: {figures[name]:.4f}")
    report(
        "bundled_model",
        figures,
        {
            "full within 3 % of alone": full <= 1.03 * alone_bits,
            "half depth within 8 % of full": half_depth <= 1.08 * full,
            "half width within 5 % of full": half_width <= 1.05 * full,
            "each entry better than the one below it": all(low < high for low, high in pairwise(qualities)),
        },
    )


if __name__ == "__main__":
    main()
