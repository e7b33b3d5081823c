"""Training: optimisers and schedules by name, the state and its checkpoints, metrics."""
