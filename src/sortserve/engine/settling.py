"""What a start leaves open ("auto", and what only the machine or the ladder can tell), settled once."""

import logging
from dataclasses import dataclass, replace

import torch

from sortserve.engine.config import KV_BYTES, WEIGHT_BYTES, EngineConfig
from sortserve.engine.errors import LadderError, StartupError
from sortserve.engine.ladder import Ladder
from sortserve.engine.model_config import DTYPE_BYTES, ModelConfig
from sortserve.engine.sizing import most_threads
from sortserve.engine.submodel import ModelShape
from sortserve.kernels.dispatch import Dispatch, choose
from sortserve.kernels.linear_int8 import is_exact
from sortserve.kernels.products import Products, choose_products

logger = logging.getLogger(__name__)

SMALL_LAYER = 1 << 20
"""Weights of a layer under which one thread is used: two gain at most a quarter on the bundled model, and beside one
other busy process their barriers made a step of 1.5 ms take 104."""


@dataclass(frozen=True)
class Settled:
    """A configuration without "auto", and what follows from it."""

    config: EngineConfig
    dtype: torch.dtype
    dispatch: Dispatch
    products: Products  # the CPU's, of weights as they are asked for
    wide: Products  # of those that stay in the dtype, where `weights_share` leaves any

    def shape(self, model: ModelConfig) -> ModelShape:
        """The model's, in the formats that are kept."""
        return replace(
            model.shape,
            dtype_bytes=DTYPE_BYTES[self.config.dtype],
            weight_bytes=WEIGHT_BYTES[self.config.weights],
            kv_value_bytes=KV_BYTES[self.config.kv_dtype],
        )

    def narrowed(self, ladder: Ladder) -> Ladder:
        """The ladder with the layers that `weights_share` means. Raises StartupError where nobody knows which these are."""
        share = self.config.weights_share
        try:
            return ladder.narrowed(share)
        except LadderError as error:
            raise StartupError(f"weights_share is {share}: {error.message}", param="weights_share") from error

    def weights_words(self, shape: ModelShape) -> str:
        """How weights are kept: a format, and how many layers have it where not all do."""
        config = self.config
        if shape.narrow_layers is not None:
            return f"{config.weights} in {len(shape.narrow_layers)} of {shape.num_layers} layers, {config.dtype}"
        return config.dtype if config.weights == "auto" else config.weights


def settle(config: EngineConfig, model: ModelConfig) -> Settled:
    """Settle "auto": the device, CPU threads, bfloat16 on a GPU or where oneDNN has it (float32 checkpoints stay float32),
    and the CPU's products. Raises StartupError for what cannot run here."""
    try:
        dispatch = choose("cpu" if config.simulates is not None else config.device)
    except ValueError as error:
        raise StartupError(str(error), param="device") from error
    if dispatch.reason:
        logger.info("no GPU is used: %s", dispatch.reason)
    is_small = model.shape.layer_parameters < SMALL_LAYER
    num_threads = config.num_threads or (1 if is_small else most_threads())
    torch.set_num_threads(num_threads)
    name = config.dtype
    if name == "auto":
        fast = dispatch.is_cuda or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        name = "bfloat16" if model.dtype != "float32" and fast else "float32"
    dtype: torch.dtype = getattr(torch, name)
    products = wide = Products()
    if not dispatch.is_cuda and config.simulates is None:
        _check_formats(config)
        products = choose_products(dtype, int8=config.weights == "int8", compile=config.compile_kernels)
        if products.reason:
            logger.info("%s multiplies, more slowly than products of our own: %s", products.name, products.reason)
        if config.weights_share < 1.0:
            wide = choose_products(dtype, int8=False, compile=config.compile_kernels)
        dispatch = replace(dispatch, kernels=products.name)
    resolved = replace(
        config, device=dispatch.device, dtype=name, served_name=config.model_name, num_threads=num_threads
    )
    return Settled(resolved, dtype, dispatch, products, wide)


def _check_formats(config: EngineConfig) -> None:
    """Raise StartupError for a format of weights or K/V that this processor does not multiply."""
    if config.kv_dtype == "fp8":
        raise StartupError("fp8 K/V needs a CUDA GPU; start without --kv-dtype fp8 on the CPU", param="kv_dtype")
    if config.weights == "fp8":
        raise StartupError("fp8 weights need a CUDA GPU; use --weights int8 on the CPU", param="weights")
    if config.weights == "int8" and not is_exact():
        raise StartupError(
            "int8 weights need a processor with VNNI (AVX512-VNNI or AVX-VNNI); start without --weights int8",
            param="weights",
        )
