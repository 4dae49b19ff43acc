"""The engine says what transformers says: greedy tokens in float32, for every family, exit and width."""

import copy
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sortserve.engine.checkpoint import Checkpoint
from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.llm import LLM
from sortserve.engine.model_config import load_model_config
from sortserve.engine.submodel import SubModel
from sortserve.engine.weights import importance_order
from tests.engine.drive import ask, greedy, last_logits, load_engine, run
from tests.engine.tiny_models import FAMILIES, ROPE_VARIANTS, make_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

# around the block size of 16 and the step size of 24, so that prompts are chunked and share steps
PROMPT_LENGTHS = (1, 5, 16, 17, 40, 90)
MAX_TOKENS = 12
REAL_MODEL = Path("~/.cache/sortserve-models/qwen2.5-coder-0.5b-instruct").expanduser()
NEAR_TIE = 1e-3

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    **{f"{family}-tied": (family, {"tie_word_embeddings": True}) for family in FAMILIES},
    "llama-shards": ("llama", {"shards": 3}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 16}),
    "llama-all-heads": ("llama", {"num_key_value_heads": 6}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "mistral-window-over-a-block": ("mistral", {"sliding_window": 19}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
    **{
        f"llama-rope-{name}": ("llama", {"rope_parameters": dict(rope)})
        for name, rope in ROPE_VARIANTS.items()
        if name != "default"
    },
    "qwen2-rope-yarn": ("qwen2", {"rope_parameters": dict(ROPE_VARIANTS["yarn"])}),
}


def prompts(seed: int, vocab: int = 101) -> list[list[int]]:
    print(f"seed {seed}")
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(length)] for length in PROMPT_LENGTHS]


def theirs(model: PreTrainedModel, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """transformers' greedy tokens, from the prompt alone. The mask is given: without one it takes token 0, as the
    padding token, for padding."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def theirs_logits(model: PreTrainedModel, prompt: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(prompt)])).logits[0, -1]
    return logits


def first_layers(model: Any, num_layers: int) -> PreTrainedModel:
    """transformers' own model of so many layers, with the first layers' weights."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    made = type(model)(config).float().eval()
    missing = made.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not missing
    reference: PreTrainedModel = made
    return reference


def keep_neurons(model: PreTrainedModel, kept: Sequence[torch.Tensor]) -> PreTrainedModel:
    """A copy whose FFNs use these neurons only: the other columns of down are zero."""
    made = copy.deepcopy(model)
    for layer, neurons in zip(made.model.layers, kept, strict=True):
        down = layer.mlp.down_proj.weight.data
        keep = torch.zeros(down.shape[1], dtype=torch.bool)
        keep[neurons] = True
        down[:, ~keep] = 0
    return made


def write_ladder(folder: Path, *submodels: SubModel) -> Ladder:
    shape = load_model_config(folder).shape
    ladder = Ladder.of(shape, [Entry(submodel.name(shape) or "?", submodel) for submodel in submodels])
    ladder.dump(folder / "ladder.json")
    return ladder


@pytest.mark.parametrize(("family", "overrides"), CASES.values(), ids=CASES.keys())
def test_greedy_tokens(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    model = make_tiny(tmp_path, family, seed=1, **overrides)
    if "shards" in overrides:
        assert len(list(tmp_path.glob("*.safetensors"))) >= 2
    asked = prompts(2)
    engine = load_engine(tmp_path, max_step_tokens=24)
    outcomes = run(engine, [ask(str(n), prompt, greedy(MAX_TOKENS)) for n, prompt in enumerate(asked)])
    expected = [theirs(model, prompt, MAX_TOKENS) for prompt in asked]
    assert [outcome.tokens for outcome in outcomes] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(expected), "answers that are alike would prove little"


@pytest.mark.parametrize(
    ("family", "overrides", "changed"),
    [
        pytest.param("mistral", {"sliding_window": 19}, {"sliding_window": 20}, id="window"),
        pytest.param("llama", {}, {"rope_parameters": dict(ROPE_VARIANTS["linear"])}, id="rope"),
        pytest.param("llama", {}, {"rms_norm_eps": 0.3}, id="eps"),
    ],
)
def test_a_wrong_model_is_noticed(
    tmp_path: Path, family: str, overrides: dict[str, Any], changed: dict[str, Any]
) -> None:
    """The check above fails for the same weights under a configuration that is a little off."""
    make_tiny(tmp_path, family, seed=1, **overrides)
    other = make_tiny(tmp_path / "other", family, seed=1, **overrides | changed)
    asked = prompts(2)
    outcomes = run(load_engine(tmp_path), [ask(str(n), p, greedy(MAX_TOKENS)) for n, p in enumerate(asked)])
    assert [outcome.tokens for outcome in outcomes] != [theirs(other, prompt, MAX_TOKENS) for prompt in asked]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_exit_is_a_model_of_so_many_layers(tmp_path: Path, family: str) -> None:
    """All exits in the same steps."""
    model = make_tiny(tmp_path, family, seed=4)
    depths = range(1, 7)
    ladder = write_ladder(tmp_path, *(SubModel.make(depth, 64) for depth in depths))
    asked = prompts(5)
    requests = [
        ask(f"{entry.id}/{n}", prompt, greedy(MAX_TOKENS), submodel=entry.id)
        for entry in ladder.entries
        for n, prompt in enumerate(asked)
    ]
    outcomes = iter(run(load_engine(tmp_path, max_step_tokens=50), requests))
    answers = set()
    for entry in ladder.entries:
        reference = first_layers(model, entry.submodel.depth)
        for prompt in asked:
            outcome = next(outcomes)
            assert set(outcome.submodels) == {entry.id}
            assert outcome.tokens == theirs(reference, prompt, MAX_TOKENS), (entry.id, len(prompt))
            answers.add(tuple(outcome.tokens))
    assert len(answers) > len(asked) * 5, "depths that answer alike would prove little"


@pytest.mark.parametrize("overrides", [{}, {"mlp_bias": True}], ids=["plain", "mlp-bias"])
def test_every_width_is_a_model_with_the_other_columns_zero(tmp_path: Path, overrides: dict[str, Any]) -> None:
    """Five widths, so that one lies inside a block and is masked; one of them differs from layer to layer."""
    model = make_tiny(tmp_path, "llama", seed=6, **overrides)
    widths: list[int | list[int]] = [8, 20, 32, 48, [64, 8, 48, 33, 20, 7]]
    submodels = [SubModel.make(6, width) for width in widths]
    ladder = Ladder.of(
        load_model_config(tmp_path).shape, [Entry(f"w{n}", submodel) for n, submodel in enumerate(submodels)]
    )
    ladder.dump(tmp_path / "ladder.json")
    asked = prompts(7)
    requests = [
        ask(f"{name}/{n}", prompt, greedy(MAX_TOKENS), submodel=name)
        for name in ("w0", "w1", "w2", "w3", "w4")
        for n, prompt in enumerate(asked)
    ]
    outcomes = iter(run(load_engine(tmp_path, max_step_tokens=50), requests))
    for submodel in submodels:
        reference = keep_neurons(model, [torch.arange(width) for width in submodel.widths])
        for prompt in asked:
            assert next(outcomes).tokens == theirs(reference, prompt, MAX_TOKENS), (submodel, len(prompt))


def test_the_default_ladder_leaves_the_full_model_as_it_is(tmp_path: Path) -> None:
    """Without ladder.json the neurons are put in order of importance: the full model's logits stay, a narrower one has
    the most important neurons and not the first ones."""
    model = make_tiny(tmp_path, "llama", seed=8, mlp_bias=True)
    prompt = prompts(9)[4]
    sorted_engine = load_engine(tmp_path)
    narrow = sorted_engine.info.ladder.entries[0].submodel
    assert narrow.widths == (48,) * 6, "75 % of 64"

    def error(got: torch.Tensor, expected: torch.Tensor) -> float:
        return float((got.double() - expected.double()).norm() / expected.double().norm())

    full = theirs_logits(model, prompt)
    assert error(last_logits(sorted_engine, prompt), full) < 1e-5
    layers = list(model.model.layers)
    orders = [importance_order(layer.mlp.down_proj.weight) for layer in layers]
    got = last_logits(sorted_engine, prompt, sorted_engine.info.ladder.entries[0].id)
    best = theirs_logits(keep_neurons(model, [order[:48] for order in orders]), prompt)
    first = theirs_logits(keep_neurons(model, [torch.arange(48)] * 6), prompt)
    assert error(got, best) < 1e-5
    assert error(got, first) > 1e-2
    assert error(got, full) > 1e-2

    write_ladder(tmp_path, SubModel.make(6, 48))  # with a ladder the neurons stay where they are
    given_engine = load_engine(tmp_path)
    assert error(last_logits(given_engine, prompt), full) < 1e-5
    assert error(last_logits(given_engine, prompt, given_engine.info.ladder.entries[0].id), first) < 1e-5


def test_importance_by_hand() -> None:
    """Column norms 5, 2, 5 and 9: the largest first, of equal ones the first."""
    down = torch.tensor([[3.0, 2.0, 0.0, 9.0], [4.0, 0.0, 5.0, 0.0]])
    assert importance_order(down).tolist() == [3, 0, 2, 1]


def test_every_tensor_is_read_from_its_own_shard(tmp_path: Path) -> None:
    model = make_tiny(tmp_path, "qwen2", seed=1, shards=3)
    source = Checkpoint.open(tmp_path, load_model_config(tmp_path))
    for number, layer in enumerate(model.model.layers):
        read = source.read(source.names.layers[number].gate, torch.float32)
        assert torch.equal(read, layer.mlp.gate_proj.weight)


# ---- a real checkpoint

QUESTIONS = (
    "def fibonacci(n):",
    "Write a Python function that reverses a linked list.",
    "import numpy as np\n\n",
    "The capital of France is",
    "SELECT name, COUNT(*) FROM users",
    "#include <stdio.h>\nint main",
    "Explain the difference between a process and a thread.",
    "class Stack:\n    def __init__(self):",
    "1, 1, 2, 3, 5, 8,",
    "Once upon a time",
    "// quicksort in JavaScript\nfunction",
    "To be, or not to be,",
    "How do I undo the last git commit?",
    "fn main() {",
    "A haiku about the sea:\n",
    "The derivative of x^3 is",
    "docker run -it",
    "Translate to German: The cat sleeps on the sofa.",
    "try:\n    with open(path) as f:",
    "Roses are red,",
)


def real_model_sizes(config: pytest.Config) -> tuple[int, int]:
    """Prompts and tokens; skips where nobody asked for minutes of work."""
    wanted = os.environ.get("SORTSERVE_REAL_MODEL") == "1"
    selected = "real_model" in config.getoption("markexpr")
    if not (REAL_MODEL / "config.json").is_file():
        pytest.skip(f"no checkpoint in {REAL_MODEL}")
    if os.environ.get("CI") and not wanted and not selected:
        pytest.skip("in CI only with SORTSERVE_REAL_MODEL=1 or -m real_model")
    return (20, 64) if wanted else (4, 16)


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_model(pytestconfig: pytest.Config) -> None:
    """Qwen2.5-Coder-0.5B in float32. Sums in another order may turn a near-tie: where tokens differ, transformers' own
    two best logits must be closer than 1e-3, and the comparison of that answer ends there. Measured: none in 20 answers
    of 64."""
    num_prompts, max_tokens = real_model_sizes(pytestconfig)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    llm = LLM(REAL_MODEL, dtype="float32", kv_bytes=64 << 20, max_model_len=512, warmup=False)
    asked = [llm.tokenizer.encode(text) for text in QUESTIONS[:num_prompts]]
    got = [list(one.token_ids) for one in llm.generate(asked, greedy(max_tokens, ignore_eos=True))]
    del llm
    model: Any = AutoModelForCausalLM.from_pretrained(REAL_MODEL, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.repetition_penalty = 1.0  # the checkpoint's own default is 1.1
    ties = 0
    for prompt, tokens in zip(asked, got, strict=True):
        expected = theirs(model, prompt, max_tokens)
        if tokens == expected:
            continue
        place = next(i for i in range(max_tokens) if tokens[i] != expected[i])
        best = theirs_logits(model, [*prompt, *expected[:place]]).topk(2).values
        gap = float(best[0] - best[1])
        print(f"near-tie: token {place}, {tokens[place]} for {expected[place]}, gap {gap:.2e}")
        assert gap < NEAR_TIE, (place, tokens, expected)
        ties += 1
    assert ties <= num_prompts // 4, "so many are no accident"
