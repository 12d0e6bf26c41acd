"""Models in Hugging Face's format: export and import of weights, configuration and tokenizer."""
