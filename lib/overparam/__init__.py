"""overparam: how much of a language model can be taken away before its quality goes."""

import logging

__version__ = "0.1.0"

# transformers imports torchao wherever it is installed, and says which of its CUDA kernels a machine does not have
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
