"""Names of our model classes in vLLM's registry. No vLLM here: the plugin that registers them must be light."""

MODULE = "sortserve.engine.vllm.model.families"
ARCHITECTURES = {
    "LlamaForCausalLM": "SortedLlamaForCausalLM",
    "MistralForCausalLM": "SortedMistralForCausalLM",
    "Qwen2ForCausalLM": "SortedQwen2ForCausalLM",
    "Qwen3ForCausalLM": "SortedQwen3ForCausalLM",
}
"""Architecture of a config.json -> ours, which is also the name of the class in MODULE."""
