"""Reports of a run: statistics, metrics.jsonl, TensorBoard, progress."""
