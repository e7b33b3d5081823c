"""Reading a compiled program: its instructions priced, its collectives, its memory."""
