"""Plots of results at several loads: attainment, goodput and quality against load, and attainment against quality."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sortserve.engine.errors import SortServeError
from sortserve.engine.simulator.experiment import Result
from sortserve.engine.simulator.report import policies_of


def draw(results: Mapping[float, Result], title: str, stem: Path) -> list[Path]:
    """`stem`.svg and `stem`.png; `results` by load. Needs matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SortServeError("plots need matplotlib; pip install 'sortserve[simulate]'") from error
    figure = Figure(figsize=(11, 8), layout="constrained")  # no pyplot: nothing global, no display
    FigureCanvasAgg(figure)
    attained, goodput, quality, frontier = figure.subplots(2, 2).ravel()
    loads = sorted(results)
    for policy in policies_of(results[loads[0]]):
        runs = [[run.summary for run in results[load].of(policy)] for load in loads]
        met = np.array([np.mean([each.attainment for each in at]) for at in runs])
        attained.plot(loads, 100 * met, marker="o", label=policy)
        goodput.plot(loads, [np.mean([each.goodput for each in at]) for at in runs], marker="o")
        mean_quality = [np.mean([each.mean_quality for each in at]) for at in runs]
        quality.plot(loads, mean_quality, marker="o")
        frontier.plot(mean_quality, 100 * met, marker="o")
    if all(results[load].bounds for load in loads):
        bounds = [list(results[load].bounds.values()) for load in loads]
        black = {"color": "black", "linestyle": "--", "label": "bound"}
        attained.plot(loads, [100 * np.mean([each.met for each in at]) for at in bounds], **black)
        goodput.plot(loads, [np.mean([each.goodput for each in at]) for at in bounds], **black)
    names = (
        (attained, "load, of full-size capacity", "budgets kept, %"),
        (goodput, "load, of full-size capacity", "goodput, quality a second"),
        (quality, "load, of full-size capacity", "mean quality of answers"),
        (frontier, "mean quality of answers", "budgets kept, %"),
    )
    for axes, across, up in names:
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(alpha=0.3)
    attained.legend(fontsize=8)
    figure.suptitle(title)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=110)
    return paths
