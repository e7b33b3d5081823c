"""Parallel execution: named dims, rules, meshes, scanned stacks, and the only door from a model to a kernel."""
