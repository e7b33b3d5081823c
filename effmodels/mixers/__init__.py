"""Token mixers: how positions exchange information. One file each; see base.py for the contract and registry.py for the names."""
