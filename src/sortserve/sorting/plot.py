"""Quality against cost as an SVG: one circle per sub-model, dominated ones hollow, the ladder joined by a line."""

from collections.abc import Sequence
from html import escape

from sortserve.engine.ladder import Entry, Ladder

WIDTH, HEIGHT, MARGIN = 720, 440, 64
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f}.axis{stroke:#8c959f}.grid{stroke:#d8dee4}"
    ".rung{fill:#0969da}.degraded{fill:#bc4c00}.left-out{fill:none;stroke:#8c959f}.whisker,.line{stroke:#0969da;fill:none}"
)


def quality_plot(ladder: Ladder, left_out: Sequence[Entry] = (), title: str = "") -> str:
    """The SVG. Cost is the share of the full model's weight bytes read per token. Entries without quality are left out."""
    shape = ladder.shape
    full_bytes = ladder.costs[ladder.full].weight_bytes
    rungs = [entry for entry in ladder.entries if entry.quality is not None]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title or 'Quality against cost')}</title><style>{_STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        *_axes(),
    ]

    def place(entry: Entry) -> tuple[float, float]:
        assert entry.quality is not None
        return _x(entry.submodel.cost(shape).weight_bytes / full_bytes), _y(entry.quality.value)

    if rungs:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, rungs))
        parts.append(f'<polyline class="line" points="{line}"/>')
    for entry in left_out:
        if entry.quality is not None:
            x, y = place(entry)
            parts.append(f'<circle class="left-out" cx="{x:.1f}" cy="{y:.1f}" r="4">{_tip(entry)}</circle>')
    for entry in rungs:
        x, y = place(entry)
        quality = entry.quality
        if quality is not None and quality.low is not None and quality.high is not None:
            parts.append(f'<path class="whisker" d="M{x:.1f} {_y(quality.low):.1f}V{_y(quality.high):.1f}"/>')
        kind = "degraded" if entry.degraded else "rung"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">{_tip(entry)}</circle>')
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 14:.1f}">{escape(entry.id)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _axes() -> list[str]:
    parts = []
    for tenth in range(0, 11, 2):
        x, y = _x(tenth / 10), _y(tenth / 10)
        parts.append(f'<path class="grid" d="M{x:.1f} {_y(0):.1f}V{_y(1):.1f}M{_x(0):.1f} {y:.1f}H{_x(1):.1f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{_y(0) + 18:.1f}" text-anchor="middle">{10 * tenth} %</text>')
        parts.append(f'<text x="{_x(0) - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{tenth / 10:.1f}</text>')
    parts.append(f'<path class="axis" d="M{_x(0):.1f} {_y(1):.1f}V{_y(0):.1f}H{_x(1):.1f}" fill="none"/>')
    label = "weight bytes read per token, of the full model"
    parts.append(f'<text x="{_x(0.5):.1f}" y="{HEIGHT - 16}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{_x(0):.1f}" y="{_y(1) - 16:.1f}">quality, of the full model (95 % interval)</text>')
    return parts


def _x(share: float) -> float:
    return MARGIN + share * (WIDTH - 2 * MARGIN)


def _y(quality: float) -> float:
    return HEIGHT - MARGIN - quality * (HEIGHT - 2 * MARGIN)


def _tip(entry: Entry) -> str:
    assert entry.quality is not None
    return f"<title>{escape(entry.id)}: quality {entry.quality.value:.3f}</title>"
