"""vLLM's workers with our model runners; nothing else is done here (Ray's executor by-passes workers)."""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker


class SubmodelWorker(Worker):
    """On a GPU."""

    def _make_model_runner(self) -> Any:
        if self.use_v2_model_runner:
            from sortserve.engine.vllm.runner_v2 import SubmodelRunnerV2

            return SubmodelRunnerV2(self.vllm_config, self.device)
        from sortserve.engine.vllm.runner_v1 import SubmodelGPURunner

        return SubmodelGPURunner(self.vllm_config, self.device)


class SubmodelCPUWorker(CPUWorker):
    """On a CPU; vLLM makes its runner inside `init_device`, so that one is made in vain and replaced."""

    def init_device(self) -> None:
        """vLLM's."""
        super().init_device()
        from sortserve.engine.vllm.runner_v1 import SubmodelCPURunner

        self.model_runner = SubmodelCPURunner(self.vllm_config, self.device)
