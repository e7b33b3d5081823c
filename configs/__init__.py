"""One file per experiment: `get_config(arg=None)` returns an ml_collections.ConfigDict. Loads without jax."""
