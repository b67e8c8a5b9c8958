"""What happens around a model: with which settings it runs on this machine."""

from typing import TYPE_CHECKING

from overparam.support import lazy

if TYPE_CHECKING:
    from overparam.serve.encoding import SCHEMES, Encoders, Setting
    from overparam.serve.llama_cpp import LlamaCpp
    from overparam.serve.tuning import Tuned, autotune
else:
    __getattr__, __dir__ = lazy.exports(__name__)

__all__ = ["SCHEMES", "Encoders", "LlamaCpp", "Setting", "Tuned", "autotune"]
