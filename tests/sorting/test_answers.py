"""Task scores: what counts as right, intervals, and that programs are held to their limits."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from sortserve.engine.errors import SortingError
from sortserve.engine.ladder import Entry
from sortserve.engine.ladder_file import Score
from sortserve.engine.llm import LLM
from sortserve.engine.submodel import SubModel
from sortserve.server.cli import BUNDLED
from sortserve.sorting import kept_scores
from sortserve.sorting.answers import Question, Task, gsm8k, humaneval, score, tasks, wilson
from sortserve.sorting.decoder import Decoder
from sortserve.sorting.kept_scores import KeptScores
from sortserve.sorting.lm_eval import read_results
from sortserve.sorting.sandbox import runs

PROBLEM = {
    "prompt": "def twice(x):\n",
    "entry_point": "twice",
    "canonical_solution": "    return x + x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate('a') == 'aa'\n",
}


@given(st.integers(1, 500).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_intervals_are_wilsons(of: tuple[int, int]) -> None:
    found = wilson(*of)
    expected = binomtest(*of).proportion_ci(method="wilson")
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high], abs=2e-6)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("5 + 2 = 7\n#### 1,234", "So it is 1234.", True),
        ("#### 18", "First 9 and 9.\n#### 18", True),
        ("#### 18", "She makes $18.00 a day.", True),
        ("#### 18", "18 eggs, so 19", False),
        ("#### -3", "The answer is -3", True),
        ("#### 18", "I do not know", False),
    ],
)
def test_gsm8k_compares_the_last_number(tmp_path: Path, answer: str, text: str, right: bool) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": answer}) + "\n")
    [question] = gsm8k(path, 5).questions
    assert (question.prompt, question.is_right(text)) == ("How many?", right)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("    return x + x\n", True),
        ("    return 2 * x\n", True),
        ("    return x\n", False),
        ("    return (\n", False),
        ("    raise SystemExit(0)\n", True),  # a program that ends well is taken for right: a limit of the method
        ("    open('/etc/passwd', 'w')\n", False),
        ("    import os; return os.environ.get('SECRET') or x + x\n", True),  # the environment is empty
    ],
)
def test_humaneval_runs_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, completion: str, right: bool) -> None:
    monkeypatch.setenv("SECRET", "told")
    path = tmp_path / "HumanEval.jsonl"
    path.write_text(json.dumps(PROBLEM) + "\n")
    [question] = humaneval(path, 1).questions
    assert question.is_right(completion) == right


def test_programs_stay_in_a_folder_that_goes_away(tmp_path: Path) -> None:
    assert runs("import os\nassert os.listdir('.') == ['program.py']\nopen('left', 'w').write('x')\n")
    assert runs("import os\nassert os.listdir('.') == ['program.py']\n")


def test_a_program_may_take_only_so_much_memory() -> None:
    assert runs("bytearray(1 << 26)\n")
    assert not runs("bytearray(3 << 29)\n")


def test_a_program_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sortserve.sorting.sandbox.PROGRAM_SECONDS", 1)
    assert not runs("while True: pass\n")
    assert not runs("import time\ntime.sleep(60)\n")


def test_malformed_tasks_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "a", "answer": "no mark"}\n')
    with pytest.raises(SortingError, match="line 1 has no question"):
        gsm8k(path, 1)
    with pytest.raises(SortingError, match="line 1 is no HumanEval problem"):
        humaneval(path, 1)
    for wrong in ("gsm8k", "arc=x"):
        with pytest.raises(SortingError, match="must be one of gsm8k=FILE, humaneval=FILE"):
            tasks([wrong], 3)


def test_each_submodel_answers_itself() -> None:
    """The bundled model's answers, judged by a rule that only its full model's greedy text meets."""
    llm = LLM(BUNDLED, dtype="float32", kv_bytes=1 << 24, warmup=False)
    prompts = ["Once upon a time", "The old man said"]
    ids = [entry.id for entry in llm.engine.info.ladder.entries]
    from sortserve.engine.sampling import SamplingParams

    texts = [llm.generate([p], SamplingParams(max_tokens=12, temperature=0.0))[0].text for p in prompts]
    questions = tuple(Question(p, t.__eq__) for p, t in zip(prompts, texts, strict=True))
    task = Task("same", questions, 12, is_chat=False)
    assert score(llm, ids[-1], ids[-1], task).value == 1.0
    assert score(llm, ids[0], ids[0], task).value < 1.0


def heard(texts: list[str], text: str) -> bool:
    """A rule that any answer meets, and that keeps it."""
    texts.append(text)
    return True


@torch.inference_mode()
def test_a_pair_computes_prompt_and_answer_on_its_own() -> None:
    """Token by token against whole forward passes without a cache: tokens of the prompt on the one, of the answer on the
    other; the first one is drawn from the prompt's last row."""
    llm = LLM(BUNDLED, dtype="float32", kv_bytes=1 << 24, warmup=False)
    entries = llm.engine.info.ladder.entries
    narrow = next(entry for entry in entries[:-1] if entry.submodel.depth == entries[-1].submodel.depth)
    decoder = Decoder.load(BUNDLED, torch.float32, 64)
    texts: list[str] = []
    for prompt, answer in ((narrow, entries[-1]), (entries[-1], narrow)):
        asked = "The old man looked at the sea and said that he"
        start = tokens = llm.tokenizer.encode(asked)
        for _ in range(12):
            is_prompt = torch.arange(len(tokens))[None] < len(start)
            states = decoder.run_pair(torch.tensor([tokens]), is_prompt, prompt.submodel, answer.submodel)
            tokens = [*tokens, int(decoder.logits(states[0, -1:]).argmax())]
        task = Task("any", (Question(asked, partial(heard, texts)),) * 3, 12, is_chat=False)
        score(llm, prompt.id, answer.id, task)
        assert texts[-3:] == [llm.tokenizer.decode(tokens[len(start) :])] * 3
    assert texts[0] != texts[-1], "a test of nothing: both pairs say the same"
    assert llm.engine.scheduler.policy.name == "slack"


def test_scores_outlive_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if ids have changed; not if the weights or the questions have."""
    model, path = tmp_path / "model", tmp_path / "ladder.unfinished.json"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    narrow, full = Entry("narrow", SubModel.make(4, 8)), Entry("full", SubModel.make(4, 16))
    task = Task("same", (Question("Who?", bool),), 12)
    asked: list[tuple[str, str]] = []

    def answered(llm: object, prompt_id: str, answer_id: str, task: Task, progress: object) -> Score:
        asked.append((prompt_id, answer_id))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return wilson(len(asked), 5)

    monkeypatch.setattr(kept_scores, "score", answered)
    llm: Any = None
    first = KeptScores(path, model, "auto")
    told = [first.score(llm, narrow, narrow, task), first.score(llm, narrow, full, task)]
    with pytest.raises(KeyboardInterrupt):
        first.score(llm, full, narrow, task)
    again, renamed = KeptScores(path, model, "auto"), Entry("renamed", narrow.submodel)
    assert [again.score(llm, renamed, renamed, task), again.score(llm, renamed, full, task)] == told
    assert len(asked) == 3
    assert again.score(llm, full, narrow, task) == wilson(4, 5)
    others = Task("same", (Question("Where?", bool),), 12)
    assert KeptScores(path, model, "auto").score(llm, narrow, narrow, others) == wilson(5, 5)
    (model / "model.safetensors").write_bytes(b"others!")
    asked.clear()
    assert KeptScores(path, model, "auto").score(llm, narrow, narrow, task) == wilson(1, 5)
    path.write_bytes(b'{"of": [')
    assert KeptScores(path, model, "auto").score(llm, narrow, narrow, task) == wilson(2, 5)


def test_results_of_the_harness() -> None:
    """As lm-eval 0.4 writes them."""
    report = {
        "results": {
            "arc_easy": {
                "alias": "arc_easy",
                "acc,none": 0.4,
                "acc_stderr,none": 0.05,
                "acc_norm,none": 0.5,
                "acc_norm_stderr,none": 0.1,
            },
            "gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A"},
        },
        "n-samples": {"arc_easy": {"original": 2376, "effective": 100}, "gsm8k": {"original": 1319, "effective": 8}},
    }
    found = read_results(report)
    assert (found["arc_easy"].value, found["arc_easy"].questions) == (0.5, 100)
    assert found["arc_easy"] == wilson(50, 100)
    assert found["gsm8k"] == wilson(2, 8), "of the harness's error, N/A, nothing is read"
    with pytest.raises(SortingError, match=r"task wiki reports word_perplexity"):
        read_results({"results": {"wiki": {"word_perplexity,none": 12.0}}})
