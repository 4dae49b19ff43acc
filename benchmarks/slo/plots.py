"""The benchmark's plots, from its JSON: `python -m benchmarks.slo.plots results/slo-NAME.json` makes SVG beside it.

Apart from measuring, so that matplotlib (extra `simulate`) may be missing where it is measured.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

POLICIES = ("fixed:floor", "fixed", "reject-only", "global-cap", "admission-only", "slackfit", "confidence", "slack")
# Okabe and Ito's colours, told apart by most; a marker each for those who see none
_COLOURS = ("#bbbbbb", "#666666", "#56b4e9", "#e69f00", "#cc79a7", "#009e73", "#8c6d1f", "#0072b2")
_MARKERS = ("s", "s", "v", "D", "^", "P", "X", "o")


def draw(points: Sequence[dict[str, Any]], stem: Path) -> list[Path]:
    """The frontier of attainment against quality, and both against load; the files made. Raises ImportError without
    matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sortserve"  # the same points make the same file
    from matplotlib import pyplot

    counted = [point for point in points if not point["void"]]
    files = []
    for name, across, panels in (
        ("frontier", "mean_quality", ("attainment",)),
        ("load", "load", ("attainment", "mean_quality", "goodput_per_second")),
    ):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), squeeze=False)
        for panel, axis in zip(panels, axes[0], strict=True):
            for policy, colour, marker in zip(POLICIES, _COLOURS, _MARKERS, strict=True):
                mine = sorted(
                    (point for point in counted if point["policy"] == policy and point[across] is not None),
                    key=lambda point: point["load"],
                )
                if mine:
                    x, y = [point[across] for point in mine], [point[panel] for point in mine]
                    axis.plot(x, y, color=colour, marker=marker, label=policy, linewidth=1.4, markersize=5)
                if name == "frontier":
                    for point in mine:
                        axis.annotate(f"{point['load']:.2g}x", (point[across], point[panel]), fontsize=6, alpha=0.7)
            axis.set_xlabel(_label(across))
            axis.set_ylabel(_label(panel))
            axis.grid(alpha=0.25)
        if counted:
            axes[0][0].legend(fontsize=7)
        figure.tight_layout()
        files.append(stem.with_name(f"{stem.name}-{name}.svg"))
        figure.savefig(files[-1], metadata={"Date": None})
        pyplot.close(figure)
    return files


def _label(name: str) -> str:
    return {
        "load": "load, in the full model's capacity",
        "attainment": "budgets met",
        "mean_quality": "mean quality",
        "goodput_per_second": "goodput per second",
    }[name]


def main() -> None:
    """Draw again what was measured before."""
    for name in sys.argv[1:]:
        path = Path(name)
        for made in draw(json.loads(path.read_text())["points"], path.with_suffix("")):
            print(made)


if __name__ == "__main__":
    main()
