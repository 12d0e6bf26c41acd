"""Text to training samples: tokenizer, corpus preparation, and the blended dataset that training reads."""
