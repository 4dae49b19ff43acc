"""Task scores by generation: GSM8K and HumanEval on the engine itself, sub-model by sub-model, with intervals.

Greedy answers, all questions in one batch: pinned to a sub-model, or the prompts on one and the answers on another. The
first token of an answer is drawn from the prompt's last row, so the prompt's sub-model draws it. GSM8K: the last number of
the answer is compared with the one after `####`. HumanEval runs code that the model wrote (see `sandbox`), so it must be
asked for.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path

import numpy as np

from sortserve.engine.errors import SortingError
from sortserve.engine.ladder_file import Score
from sortserve.engine.llm import LLM, Completion
from sortserve.engine.policies.protocol import Decision, Reason, View
from sortserve.engine.sampling import SamplingParams
from sortserve.sorting.sandbox import runs
from sortserve.sorting.texts import read_rows

Progress = Callable[[str], None]
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif __name__", "\nprint(", "\n```")


@dataclass(frozen=True)
class Question:
    """A prompt, and what tells whether an answer is right."""

    prompt: str
    is_right: Callable[[str], bool]


@dataclass(frozen=True)
class Task:
    """Questions of one kind, asked with these limits. `is_chat`: through the chat template if there is one."""

    name: str
    questions: tuple[Question, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    is_chat: bool = True

    @property
    def digest(self) -> str:
        """SHA-256 of what is asked and how."""
        content = [self.max_tokens, self.stop, self.is_chat, [question.prompt for question in self.questions]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def gsm8k(path: Path, count: int) -> Task:
    """The first `count` questions of a GSM8K file. Raises SortingError if it is none."""
    questions = []
    for number, row in enumerate(read_rows(path)[:count], start=1):
        try:
            question, answer = str(row["question"]), str(row["answer"]).rsplit("####", 1)[1]
        except (KeyError, IndexError) as error:
            raise SortingError(f"{path} line {number} has no question with an answer after ####") from error
        wanted = _last_number(answer)
        questions.append(Question(question, partial(_ends_in, wanted)))
    return Task("gsm8k", tuple(questions), 320)


def humaneval(path: Path, count: int) -> Task:
    """The first `count` problems of a HumanEval file, completed as plain text; scoring runs the completions."""
    questions = []
    for number, row in enumerate(read_rows(path)[:count], start=1):
        try:
            prompt, check = str(row["prompt"]), f"{row['test']}\ncheck({row['entry_point']})\n"
        except KeyError as error:
            raise SortingError(f"{path} line {number} is no HumanEval problem: it lacks {error}") from error
        questions.append(Question(prompt, partial(_passes, prompt, check)))
    return Task("humaneval", tuple(questions), 256, _STOPS, is_chat=False)


TASKS: dict[str, Callable[[Path, int], Task]] = {"gsm8k": gsm8k, "humaneval": humaneval}


class PairPolicy:
    """Requests that may run any sub-model compute their prompt on one place of the ladder and their answer on another."""

    name = "pair"

    def __init__(self, prompt: int, answer: int) -> None:
        self._prompt, self._answer = prompt, answer

    def decide(self, view: View) -> Decision:
        """By whether there is an answer yet; the pinned ones stay where they are."""
        place = np.clip(np.where(view.num_output == 0, self._prompt, self._answer), view.floor, view.ceiling)
        return Decision(place, np.full(len(view), int(Reason.FIXED)), np.zeros(len(view), np.bool_), view.step_tokens)


def score(llm: LLM, prompt_id: str, answer_id: str, task: Task, progress: Progress | None = None) -> Score:
    """The share of right answers, with a 95 % Wilson interval; one id twice: of that sub-model throughout."""
    tokenizer = llm.tokenizer
    prompts: list[list[int]] = []
    for question in task.questions:
        if task.is_chat and tokenizer.chat_template is not None:
            prompts.append(tokenizer.chat([{"role": "user", "content": question.prompt}]))
        else:
            prompts.append(
                tokenizer.encode(f"Question: {question.prompt}\nAnswer:" if task.is_chat else question.prompt)
            )
    params = SamplingParams(max_tokens=task.max_tokens, temperature=0.0, stop=task.stop)
    completions = _generate(llm, prompts, params, prompt_id, answer_id)
    right = sum(
        question.is_right(completion.text) for question, completion in zip(task.questions, completions, strict=True)
    )
    if progress is not None:
        name = answer_id if prompt_id == answer_id else f"prompt {prompt_id}, answer {answer_id}"
        progress(f"{task.name} {name}: {right} of {len(prompts)}")
    return wilson(right, len(prompts))


def _generate(
    llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams, prompt_id: str, answer_id: str
) -> list[Completion]:
    if prompt_id == answer_id:
        return llm.generate(prompts, params, submodel=answer_id)
    scheduler, ladder = llm.engine.scheduler, llm.engine.info.ladder
    places = [ladder.place(name) for name in (prompt_id, answer_id)]
    before = scheduler.policy, scheduler.decider.ask_every
    scheduler.policy, scheduler.decider.ask_every = PairPolicy(*places), 1
    try:
        found = llm.generate(prompts, params, floor=ladder.entries[min(places)].id, kv_mode="reuse")
    finally:
        scheduler.policy, scheduler.decider.ask_every = before
    assert all(one.submodels[:1] == (prompt_id,) and set(one.submodels[1:]) <= {answer_id} for one in found)
    return found


def wilson(right: float, count: int) -> Score:
    """right / count with its 95 % Wilson score interval, which holds for small counts and near 0 and 1 too. For points
    between 0 and 1 per question it is wider than need be, never narrower."""
    if count < 1:
        raise SortingError("a score needs at least one question")
    z = 1.959964
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    low, high = max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))
    return Score(round(share, 6), round(low, 6), round(high, 6), count)


def _ends_in(wanted: Decimal | None, text: str) -> bool:
    return _last_number(text) == wanted


def _passes(prompt: str, check: str, text: str) -> bool:
    return runs(f"{prompt}{text}\n{check}")


def _last_number(text: str) -> Decimal | None:
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    try:
        return Decimal(numbers[-1].replace(",", "")).normalize()
    except InvalidOperation:
        return None


def tasks(named: Sequence[str], count: int) -> list[Task]:
    """Tasks of arguments such as `gsm8k=FILE`. Raises SortingError for one that there is not."""
    found = []
    for argument in named:
        name, _, path = argument.partition("=")
        if name not in TASKS or not path:
            raise SortingError(f"task {argument!r} must be one of {', '.join(f'{task}=FILE' for task in TASKS)}")
        found.append(TASKS[name](Path(path), count))
    return found
