"""How many cycles a program takes on a TPU core, from the bundles that the compiler emits for it."""
