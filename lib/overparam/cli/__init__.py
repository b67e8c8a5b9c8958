"""The commands behind ``run_all.py``."""
