"""A stand-in for msgspec where it is not installed: a GPU machine may have torch, triton and little else.

The engine's plans are msgspec structs; nothing here sends or reads them, so dataclasses with the same fields do. They
take ten times as long to make, which only counts in the scheduling figures, and the results say which was used.
"""

import dataclasses
import importlib.util
import sys
from types import ModuleType
from typing import Any


class Struct:
    """Its subclasses become dataclasses. Options of msgspec's (frozen, tag, gc, ...) say nothing that matters here."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__()
        for name, default in list(vars(cls).items()):
            if not name.startswith("_") and isinstance(default, dict | list):  # msgspec copies it for each
                setattr(cls, name, dataclasses.field(default_factory=default.copy))
        dataclasses.dataclass(eq=True)(cls)


def have_structs() -> str:
    """Make `import msgspec` work; which one it is."""
    if importlib.util.find_spec("msgspec") is not None:
        return "msgspec"
    stand_in, structs = ModuleType("msgspec"), ModuleType("msgspec.structs")
    stand_in.Struct = Struct  # type: ignore[attr-defined]
    stand_in.MsgspecError = ValueError  # type: ignore[attr-defined]
    structs.replace = dataclasses.replace  # type: ignore[attr-defined]
    stand_in.structs = structs  # type: ignore[attr-defined]
    sys.modules |= {"msgspec": stand_in, "msgspec.structs": structs}
    return "dataclasses in place of msgspec"
