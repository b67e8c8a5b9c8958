"""One package a notebook: its parameters, and the loops that join the rooms below."""
