"""A plan without compiling: traced layers, formulas, and the search that they make cheap."""
