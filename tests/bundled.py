"""The bundled model's ladder, so that tests name its sub-models by what they are and outlive the model."""

from sortserve.engine.ladder import Ladder
from sortserve.engine.model_config import load_model_config
from sortserve.server.cli import BUNDLED

CONFIG = load_model_config(BUNDLED)
_FOUND = Ladder.load(BUNDLED / "ladder.json", CONFIG.shape)
LADDER = tuple(entry.id for entry in _FOUND.entries)
"""Ids, the cheapest first."""
FLOOR = next(entry.id for entry in _FOUND.entries if not entry.degraded)
MIDDLE = LADDER[len(LADDER) // 2]
ABOVE_MIDDLE = LADDER[len(LADDER) // 2 + 1]
FULL = LADDER[-1]
VOCAB = CONFIG.shape.vocab_size
