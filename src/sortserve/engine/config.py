"""What is served and how: the engine's settings. The model's own configuration is in model_config.py.

Both are frozen. "auto" stays in EngineConfig and is resolved once, by the engine at start, into a new object
(`dataclasses.replace`). Nothing here imports torch, so the command line can refuse a bad setting at once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sortserve.engine.errors import StartupError
from sortserve.engine.model_config import DTYPE_BYTES

WEIGHT_BYTES: Mapping[str, int | None] = {"auto": None, "int8": 1, "fp8": 1}
"""Bytes of a weight by `EngineConfig.weights`; None: those of the dtype."""
KV_BYTES: Mapping[str, int | None] = {"auto": None, "fp8": 1}
"""Bytes of a value of K or V by `EngineConfig.kv_dtype`; None: those of the dtype."""
MAX_BLOCK_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The engine's settings. Raises StartupError, with value and limit, for a setting no engine could run with."""

    model_folder: Path  # config.json, tokenizer.json and *.safetensors lie here
    served_name: str = ""  # model name of the API; "": the folder's name
    device: str = "auto"  # auto, cpu, cuda or cuda:<index>
    dtype: str = "auto"  # of weights, states and K/V: auto, float32, bfloat16 or float16
    weights: str = "auto"  # kept in memory as: auto (the dtype), int8 or fp8; states stay in the dtype
    weights_share: float = 1.0  # of the layers that are kept as `weights` says, the least important; under 1 no head
    kv_dtype: str = "auto"  # K/V kept in memory as: auto (the dtype) or fp8 (float8_e4m3fn, scale 1; on a GPU)
    max_model_len: int | None = None  # tokens, prompt + output; None: what model and memory allow
    kv_bytes: int | None = None  # bytes for K/V pages and exit states; None: from the free memory
    max_step_tokens: int = 256  # rows of one step, prompt chunks and refills included
    max_running: int = 64  # sequences that hold pages
    max_waiting: int = 1024  # requests in the queue; one more is refused (429)
    block_tokens: int = 16  # tokens of one block of K/V
    ladder_path: Path | None = None  # None: ladder.json in the model folder, or a built-in ladder
    policy: str = "slack"  # name of the policy that chooses sub-models
    fixed_submodel: str | None = None  # id of the ladder that every `auto` request runs; None: the policy chooses
    num_threads: int | None = (
        None  # CPU threads of one step; None: what PyTorch or the container allows, for small models 1
    )
    prefix_cache: bool = True  # keep blocks of finished requests for prompts that begin alike
    dummy_weights: bool = False  # random weights of the model's shape, for benchmarks
    simulates: str | None = (
        None  # a device of simulator/hardware.py whose step times are waited for; None: the model runs
    )
    enforce_eager: bool = False  # on a GPU: launch every kernel by itself instead of replaying CUDA graphs
    compile_kernels: bool = True  # on the CPU: products of our own in C++, where a compiler is; else oneDNN's
    vllm_args: tuple[str, ...] = ()  # name=value each, engine arguments of vLLM, for `--backend vllm`
    warmup: bool = True  # measure the cost model before the first request
    profile_cache: bool = True  # keep what was measured for the next start on this machine, in the user's cache folder

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, ("auto", *DTYPE_BYTES))
        _check_choice("weights", self.weights, tuple(WEIGHT_BYTES))
        _check_choice("kv_dtype", self.kv_dtype, tuple(KV_BYTES))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise StartupError(f"device is {self.device!r}, must be auto, cpu, cuda or cuda:<index>", param="device")
        for name, high in (
            ("max_model_len", None),
            ("kv_bytes", None),
            ("max_step_tokens", None),
            ("max_running", None),
            ("max_waiting", None),
            ("block_tokens", MAX_BLOCK_TOKENS),
            ("num_threads", None),
        ):
            _check_positive(name, getattr(self, name), high)
        if not 0.0 < self.weights_share <= 1.0:
            raise StartupError(f"weights_share is {self.weights_share}, must be in (0, 1]", param="weights_share")
        if self.weights_share < 1.0 and self.weights == "auto":
            raise StartupError("weights_share is for int8 or fp8 weights, weights is auto", param="weights_share")
        for name in ("policy", "fixed_submodel"):
            if getattr(self, name) == "":
                raise StartupError(f"{name} is empty, must be a name", param=name)

    @property
    def model_name(self) -> str:
        """The name the API serves the model under."""
        return self.served_name or self.model_folder.resolve().name


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise StartupError(f"{name} is {value!r}, must be one of {', '.join(choices)}", param=name)


def _check_positive(name: str, value: int | None, high: int | None) -> None:
    if value is not None and not (1 <= value <= (value if high is None else high)):
        limit = "at least 1" if high is None else f"in [1, {high}]"
        raise StartupError(f"{name} is {value}, must be {limit}", param=name)
