"""The step of a config compiled in a process of its own, and kept."""
