"""SortServe inside vLLM. In an environment of its own: `make test-vllm`."""
