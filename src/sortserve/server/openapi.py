"""/openapi.json of this very server: what FastAPI finds, corrected, with the key if one is asked for, and with the
names and limits of the model once it is loaded."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from sortserve.engine.protocol import EngineInfo
from sortserve.server.state import ServerState

_KEY = {"type": "http", "scheme": "bearer", "description": "One of the keys that the server was started with"}


def install_openapi(app: FastAPI, state: ServerState) -> None:
    """Answer /openapi.json with the document above. Call it after the routes are there."""
    plain: Callable[[], dict[str, Any]] = app.openapi
    made: dict[bool, dict[str, Any]] = {}  # by whether the model was loaded

    def document() -> dict[str, Any]:
        loaded = state.phase in ("ready", "draining")
        if loaded not in made:
            app.openapi_schema = None  # else FastAPI hands out the one that was made, and changed, before
            made[loaded] = plain()
            _correct(made[loaded], with_keys=not state.keys.open)
            if loaded:
                _describe_model(made[loaded], state.backend.info)
        return made[loaded]

    app.openapi = document  # type: ignore[method-assign]


def _correct(schema: dict[str, Any], with_keys: bool) -> None:
    """FastAPI's 422 is a 400 here (errors.py). Operations that may answer 401 are those that ask for a key."""
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if with_keys and "401" in operation["responses"]:
                operation["security"] = [{"bearer": []}]
    for unused in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(unused, None)
    if with_keys:
        schema["components"]["securitySchemes"] = {"bearer": _KEY}


def _describe_model(schema: dict[str, Any], info: EngineInfo) -> None:
    ids = [entry.id for entry in info.ladder.entries]
    models = [info.model, *(f"{info.model}:{submodel}" for submodel in ids)]
    names = {"model": models, "submodel": ["auto", *ids], "submodel_floor": ids}
    bodies = schema["components"]["schemas"]
    for body in ("CompletionRequest", "ChatCompletionRequest"):
        fields = bodies[body]["properties"]
        for field, known in names.items():
            _branch(fields[field], "string")["enum"] = known
        for field in ("max_tokens", "max_completion_tokens"):
            _branch(fields[field], "integer")["maximum"] = info.max_model_len
    for branch in (
        *bodies["CompletionRequest"]["properties"]["prompt"]["anyOf"],
        bodies["DetokenizeRequest"]["properties"]["tokens"],
    ):
        _limit_token_ids(branch, info.vocab_size)
    parameters = {"model_id": models, "X-Submodel": ["auto", *ids], "X-Submodel-Floor": ids}
    for operations in schema["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] in parameters:
                    parameter["schema"]["enum"] = parameters[parameter["name"]]


def _branch(field: dict[str, Any], kind: str) -> dict[str, Any]:
    """The branch of a field's type that is not null."""
    found: dict[str, Any] = next(branch for branch in field["anyOf"] if branch.get("type") == kind)
    return found


def _limit_token_ids(branch: dict[str, Any], vocab_size: int) -> None:
    """In a list of token ids, or of such lists, and nowhere else."""
    items = branch.get("items", {})
    if items.get("type") == "integer":
        items["maximum"] = vocab_size - 1
    elif items:
        _limit_token_ids(items, vocab_size)
