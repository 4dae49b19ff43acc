"""vLLM engines in this process, with and without sub-models, and what is asked of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.model_config import load_model_config
from sortserve.engine.submodel import SubModel
from tests.vllm.deciders import Programmed

BLOCK_TOKENS = 32  # the smallest of CPU attention
KV_BLOCKS = 11  # two requests of the longest prompts
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 5,
    "max_num_batched_tokens": 64,
    "block_size": BLOCK_TOKENS,
    "num_gpu_blocks_override": KV_BLOCKS,
    "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True,
}


def asif_ladder(folder: Path) -> Ladder:
    """The folder's ladder, and: attention skipped, an FFN skipped, every layer another width, and a width that is no
    boundary of a block."""
    shape = load_model_config(folder).shape
    own = Ladder.load(folder / "ladder.json", shape) if (folder / "ladder.json").exists() else Ladder.default(shape)
    deep, wide = shape.num_layers, shape.ffn_width
    staircase = [wide // 2 if layer % 2 else wide for layer in range(deep)]
    more = [
        Entry("skip-attention", SubModel.make(deep, wide, skip_attention=[1, deep - 2])),
        Entry("skip-ffn", SubModel.make(deep - 1, wide, skip_ffn=[0, 2])),
        Entry("staircase", SubModel.make(deep, staircase)),
        *(Entry(f"odd-{part}", SubModel.make(deep // 2, wide * part // 11)) for part in (1, 3, 5, 7)),
    ]
    return Ladder.of(shape, [*own.entries, *more])


@dataclass
class Engine:
    """One engine. `ladder` is that of the sub-models; a stock engine has it too, and ignores it."""

    llm: Any
    ladder: Ladder

    @property
    def free(self) -> dict[str, Any]:
        """Arguments of a request that may run anything."""
        return {"sortserve_floor": self.ladder.entries[0].id}

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def decider(self) -> Programmed:
        """What decides; its program is the test's to write."""
        decider: Programmed = self.scheduler._decider
        return decider

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        arguments: Sequence[dict[str, Any] | None],
        max_tokens: int | Sequence[int],
    ) -> list["Result"]:
        """Greedy continuations of `prompts`, run together."""
        from vllm import SamplingParams

        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        params = [
            SamplingParams(max_tokens=limit, temperature=0.0, ignore_eos=True, extra_args=extra)
            for extra, limit in zip(arguments, limits, strict=True)
        ]
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return [Result.of(output) for output in self.llm.generate(given, params, use_tqdm=False)]

    def alone(self, prompt: Sequence[int], place: int, max_tokens: int) -> list[int]:
        """The continuation of one prompt by one sub-model, with nothing cached."""
        assert self.llm.reset_prefix_cache()
        arguments = {"sortserve_submodel": self.ladder.entries[place].id}
        return self.generate([prompt], [arguments], max_tokens)[0].tokens


@dataclass
class Result:
    """Of one request: its tokens, what was told of its sub-models, prompt tokens found in the cache, and its end."""

    tokens: list[int]
    told: dict[str, Any]
    cached: int
    finish_reason: str

    @classmethod
    def of(cls, output: Any) -> "Result":
        """From vLLM's RequestOutput."""
        told = (output.kv_transfer_params or {}).get("sortserve", {})
        completion = output.outputs[0]
        return cls(list(completion.token_ids), told, output.num_cached_tokens or 0, completion.finish_reason)


def start(folder: Path, *, submodels: bool = True, ladder_path: Path | None = None, **arguments: Any) -> Engine:
    """An engine in this process, with the programmed decider; `submodels` False: vLLM as it is. It must live as long as
    any other one; see the fixture `starter`."""
    from vllm import LLM

    from sortserve.engine.vllm.launch import engine_arguments

    given = {**ARGUMENTS, **arguments}
    shape = load_model_config(folder).shape
    ladder = Ladder.load(ladder_path, shape) if ladder_path else Ladder.default(shape)
    if submodels:
        decider = "tests.vllm.deciders:programmed"
        given = engine_arguments(folder, cpu=True, ladder_path=ladder_path, decider=decider, **given)
    else:
        given = {"model": str(folder), "enforce_eager": True, "async_scheduling": False, **given}
    return Engine(LLM(**given), ladder)
