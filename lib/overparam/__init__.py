"""overparam: how much of a language model can be taken away before its quality goes."""

__version__ = "0.1.0"
