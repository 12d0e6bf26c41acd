"""What a run reports: statistics, metrics.jsonl, TensorBoard, progress."""
