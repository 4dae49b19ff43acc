"""The ladder and settings of a vLLM engine, read in each of its processes from the same two places: the model's folder
and `additional_config["sortserve"]`. Imports no vLLM: a configuration is whatever has the attributes read here."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sortserve.engine.errors import StartupError
from sortserve.engine.ladder import Ladder
from sortserve.engine.model_config import ModelConfig, load_model_config
from sortserve.engine.settings import SettingsTable
from sortserve.engine.vllm.deciding import DeciderFactory, ceiling_decider

KEY = "sortserve"
"""Of our settings in vLLM's `additional_config`."""
_KNOWN = ("ladder", "decider", "decider_options", "stats_address", "compile_kernels")


@dataclass(frozen=True)
class Configuration:
    """What the parts of the backend share. `sort_ffn`: no ladder was made for this checkpoint, so its FFN neurons are put
    in order of importance when they are loaded. `stats_address`: where the scheduler sends its figures, "" for nowhere."""

    model: ModelConfig
    ladder: Ladder
    settings: SettingsTable
    sort_ffn: bool = False
    decider: str = ""
    decider_options: Mapping[str, Any] = field(default_factory=dict)
    stats_address: str = ""
    compile_kernels: bool = True

    @classmethod
    def of(cls, folder: Path, additional: Mapping[str, Any]) -> "Configuration":
        """Read the ladder of the model in `folder`. Raises StartupError for an unknown key, and what reading model and
        ladder raise."""
        own = additional.get(KEY, {})
        unknown = sorted(set(own) - set(_KNOWN))
        if unknown:
            raise StartupError(f"additional_config {KEY}: unknown key {unknown[0]!r}; known are {', '.join(_KNOWN)}")
        model = load_model_config(folder)
        path = Path(own["ladder"]) if own.get("ladder") else folder / "ladder.json"
        has_ladder = bool(own.get("ladder")) or path.is_file()
        ladder = Ladder.load(path, model.shape) if has_ladder else Ladder.default(model.shape)
        return cls(
            model,
            ladder,
            SettingsTable(ladder),
            not has_ladder,
            own.get("decider", ""),
            own.get("decider_options", {}),
            own.get("stats_address", ""),
            bool(own.get("compile_kernels", True)),
        )

    @classmethod
    def of_vllm(cls, vllm_config: Any) -> "Configuration":
        """The same, from vLLM's own configuration object."""
        return cls.of(Path(vllm_config.model_config.model), vllm_config.additional_config or {})

    def make_decider(self) -> DeciderFactory:
        """The factory that `decider`, "module:name", names. Raises StartupError if there is none."""
        if not self.decider:
            return ceiling_decider
        module, _, name = self.decider.partition(":")
        try:
            factory: DeciderFactory = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise StartupError(f"additional_config {KEY}: no decider {self.decider!r} ({error})") from error
        return factory
