"""The language model: Megatron-Core's GPT assembled from our modules."""
