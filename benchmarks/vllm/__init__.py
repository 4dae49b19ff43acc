"""SortServe inside vLLM against vLLM alone; in the environment of `make test-vllm`."""
