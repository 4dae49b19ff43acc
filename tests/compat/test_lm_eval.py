"""lm-evaluation-harness scores sub-models from outside, by prompt log-probabilities through `echo` and `logprobs`.

An independent path checks every number: transformers on the checkpoint, cut to the sub-model's layers and FFN prefix.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sortserve.server.cli import BUNDLED
from tests.compat.environments import HERE, environment
from tests.server.real_server import Server

TASKS = ("held_out_books", "next_words", "continue_books")
RELATIVE = 2e-4  # of a sum of log-probabilities; float32 on both sides differs by about 1e-6
CONTEXT_CHARS, TARGET_CHARS, NUM_TOKENS = 200, 30, 12  # as in tasks/*.yaml


@dataclass(frozen=True)
class Scored:
    """A sub-model as the ladder tells it, and what the harness made of it."""

    submodel: Mapping[str, Any]
    results: Mapping[str, Any]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]  # by task
    remote: bool  # whether the server was its tokenizer


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scored(server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[Scored]:
    """The cheapest, a middle and the full sub-model; tokens by the tokenizer's files, and for the full one by the server."""
    ladder = httpx.get(f"{server.url}/v1/submodels").json()["data"]
    chosen = [ladder[0], ladder[len(ladder) // 2], ladder[-1]]
    files = {"tokenizer_backend": "huggingface", "tokenizer": str(BUNDLED)}
    return [
        score(server, submodel, tokenizer, tmp_path_factory.mktemp("lm-eval"))
        for submodel, tokenizer in zip(chosen, (files, files, {"tokenizer_backend": "remote"}), strict=True)
    ]


def score(server: Server, submodel: Mapping[str, Any], tokenizer: Mapping[str, str], folder: Path) -> Scored:
    """One run of the harness over all tasks."""
    shutil.copytree(HERE / "tasks", folder, dirs_exist_ok=True)  # data files are looked for where it runs
    arguments = {
        "model": f"bundled:{submodel['id']}",
        "base_url": f"{server.url}/v1/completions",
        "num_concurrent": "4",
        "max_length": "1024",
        **tokenizer,
    }
    environment("lm-eval").run(
        "lm_eval",
        "run",
        *("--model", "local-completions"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
        *("--tasks", ",".join(TASKS), "--include_path", "."),
        *("--output_path", "out", "--log_samples"),
        folder=folder,
        HF_HUB_OFFLINE="1",
    )
    (results,) = (folder / "out").rglob("results_*.json")
    samples = {}
    for task in TASKS:
        (path,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
        lines = path.read_text().splitlines()
        samples[task] = sorted(map(json.loads, lines), key=lambda sample: int(sample["doc_id"]))
    remote = tokenizer["tokenizer_backend"] == "remote"
    return Scored(submodel, json.loads(results.read_text())["results"], samples, remote)


class Reference:
    """A sub-model in transformers: the first layers, and of each FFN the first neurons; in float32."""

    def __init__(self, depth: int, width: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
        self.model: Any = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)  # in eval mode as it comes
        layers = self.model.model.layers[:depth]
        self.model.model.layers = layers
        self.model.config.num_hidden_layers = depth
        for layer in layers:
            for name, rows in (("gate_proj", True), ("up_proj", True), ("down_proj", False)):
                linear = getattr(layer.mlp, name)
                cut = linear.weight[:width] if rows else linear.weight[:, :width]
                linear.weight = torch.nn.Parameter(cut.clone())

    def encode(self, text: str) -> list[int]:
        """Without BOS, as the harness does."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    @torch.inference_mode()
    def score(self, context: Sequence[int], target: Sequence[int]) -> tuple[float, bool]:
        """Log-probability of `target` after `context`, and whether greedy decoding would write it."""
        ids = torch.tensor([*context, *target])
        logprobs = self.model(ids[None, :-1]).logits[0, len(context) - 1 :].log_softmax(-1)  # [len(target), vocab]
        picked = logprobs[torch.arange(len(target)), ids[len(context) :]]
        return float(picked.double().sum()), bool((logprobs.argmax(-1) == ids[len(context) :]).all())

    @torch.inference_mode()
    def write(self, text: str) -> str:
        """Greedy continuation up to a full stop."""
        ids = self.encode(text)
        start = len(ids)
        for _ in range(NUM_TOKENS):
            ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
        return str(self.tokenizer.decode(ids[start:])).split(".")[0]


def reference(scored: Scored) -> Reference:
    return Reference(scored.submodel["depth"], scored.submodel["width"])


def test_prompt_logprobs_are_those_of_an_independent_path(scored: list[Scored]) -> None:
    for one in scored:
        model = reference(one)
        for sample in one.samples["held_out_books"]:
            # the harness opens a text with `bos or eos` of a remote tokenizer, and this BOS is 0
            first = model.tokenizer.eos_token_id if one.remote else model.tokenizer.bos_token_id
            expected, _ = model.score([first], model.encode(sample["doc"]["text"]))
            told = float(sample["resps"][0][0])
            assert told == pytest.approx(expected, rel=RELATIVE), (one.submodel["id"], sample["doc_id"])


def test_logprobs_after_a_context(scored: list[Scored]) -> None:
    """Also tells apart which tokens are the context's and whether the target is what greedy decoding writes."""
    for one in scored:
        model = reference(one)
        for sample in one.samples["next_words"]:
            text = sample["doc"]["text"][: CONTEXT_CHARS + TARGET_CHARS]
            # the harness leaves spaces at the end of the context to the target
            context = model.encode(text[:CONTEXT_CHARS].rstrip())
            expected, greedy = model.score(context, model.encode(text)[len(context) :])
            told = sample["resps"][0][0]
            assert float(told[0]) == pytest.approx(expected, rel=RELATIVE), (one.submodel["id"], sample["doc_id"])
            assert (str(told[1]) == "True") == greedy


def test_deeper_submodels_score_better(scored: list[Scored]) -> None:
    """On books that none of them has seen. The bits are the mean of the samples, so nothing was left out."""
    bits = [one.results["held_out_books"]["bits_per_byte,none"] for one in scored]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] > bits[-1] + 0.03, "a real difference, not noise of the last digit"
    for one, told in zip(scored, bits, strict=True):
        samples = one.samples["held_out_books"]
        assert len(samples) == one.results["held_out_books"]["sample_len"] >= 10
        nats = -sum(float(sample["resps"][0][0]) for sample in samples)
        num_bytes = sum(len(sample["doc"]["text"].encode()) for sample in samples)
        assert told == pytest.approx(nats / num_bytes / math.log(2), rel=1e-6)


def test_generate_until(scored: list[Scored]) -> None:
    """Greedy text up to a full stop; one near-tie in twelve may turn with the order of sums."""
    for one in scored:
        model = reference(one)
        samples = one.samples["continue_books"]
        same = 0
        for sample in samples:
            (written,) = sample["resps"][0]
            assert "." not in written
            same += written == model.write(sample["doc"]["text"][:CONTEXT_CHARS])
        assert same >= len(samples) - 1, (one.submodel["id"], same)
