"""vLLM's workers with our model runners; nothing else is done here (Ray's executor by-passes workers)."""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from sortserve.engine.errors import StartupError


class SubmodelWorker(Worker):
    """On a GPU."""

    def _make_model_runner(self) -> Any:
        if self.use_v2_model_runner:
            raise StartupError("vLLM's second model runner is not supported; set VLLM_USE_V2_MODEL_RUNNER=0")
        from sortserve.engine.vllm.runner_v1 import SubmodelGPURunner

        return SubmodelGPURunner(self.vllm_config, self.device)


class SubmodelCPUWorker(CPUWorker):
    """On a CPU; vLLM makes its runner inside `init_device`, so that one is made in vain and replaced."""

    def init_device(self) -> None:
        """vLLM's."""
        super().init_device()
        from sortserve.engine.vllm.runner_v1 import SubmodelCPURunner

        self.model_runner = SubmodelCPURunner(self.vllm_config, self.device)
