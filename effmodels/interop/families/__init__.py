"""One file per family of checkpoints: its tensors and what its config.json says."""
