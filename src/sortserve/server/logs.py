"""What the log tells of a request: one line of what happened, and what was asked only where the operator wants that."""

from typing import Any

from sortserve.engine.text import Tokenizer
from sortserve.server.metrics import Served
from sortserve.server.prepare import Job
from sortserve.server.record import Record

MAX_PROMPT_CHARS = 1000  # of each prompt, under --log-prompts
_MAX_PROMPTS = 8  # of one request
_MAX_PATH_CHARS = 200


def request_fields(method: str, path: str, record: Record, served: Served | None, now: float) -> dict[str, Any]:
    """The fields of a request's line, None where there is nothing to tell: never what was asked, or a key."""
    fields: dict[str, Any] = {
        "method": method,
        "path": path[:_MAX_PATH_CHARS],
        "status": record.status,
        "ms": round((now - record.arrival) * 1e3, 1),
    }
    if record.key is not None and record.key.name is not None:
        fields["key"] = record.key.name
    if served is not None:
        fields |= {"submodel": served.submodel, "finish_reason": served.finish_reason}
    if record.generation is not None:
        job, answers = record.generation.job, record.generation.answers
        outcome = None if served is None else served.outcome
        fields |= {
            "job": job.id,
            "prompt_tokens": job.num_prompt_tokens,
            "completion_tokens": sum(answer.num_tokens for answer in answers),
            "budget_ms": None if job.terms.budget is None else job.terms.budget.total_ms,
            "met": None if outcome is None else outcome == "met",
        }
    return fields


def prompt_fields(job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    """The beginnings of the prompts as the model read them, and how many tokens they have."""
    shown = []
    for prompt in job.prompts[:_MAX_PROMPTS]:
        # a token is a character or more, but for few: no need to decode what is cut off
        text = prompt.text or tokenizer.decode(prompt.tokens[:MAX_PROMPT_CHARS], skip_special_tokens=False)
        shown.append(text[:MAX_PROMPT_CHARS])
    return {"job": job.id, "num_prompts": len(job.prompts), "prompts": shown}
