"""Layers: shapes and maths; no mesh, no decoding state."""
