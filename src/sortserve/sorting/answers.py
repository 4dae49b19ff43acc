"""Task scores by generation: GSM8K and HumanEval on the engine itself, sub-model by sub-model, with intervals.

Greedy answers, all questions of a sub-model in one batch, pinned to it. GSM8K: the last number of the answer is compared
with the one after `####`. HumanEval runs code that the model wrote (see `sandbox`), so it must be asked for.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path

from sortserve.engine.errors import SortingError
from sortserve.engine.ladder_file import Score
from sortserve.engine.llm import LLM
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


def score(llm: LLM, submodel_id: str, task: Task, progress: Progress | None = None) -> Score:
    """The share of right answers of one sub-model, with a 95 % Wilson interval."""
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
    completions = llm.generate(prompts, params, submodel=submodel_id)
    right = sum(
        question.is_right(completion.text) for question, completion in zip(task.questions, completions, strict=True)
    )
    if progress is not None:
        progress(f"{task.name} {submodel_id}: {right} of {len(prompts)}")
    return wilson(right, len(prompts))


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
