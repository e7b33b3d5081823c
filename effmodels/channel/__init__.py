"""Channel mixers: what happens to each position by itself. One file each; see base.py for the contract and registry.py for the names."""
