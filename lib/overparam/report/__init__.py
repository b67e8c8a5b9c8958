"""The old name of `overparam.record`, for scripts that import ``overparam.report.stats``."""

import sys

from overparam.record import stats

sys.modules[f"{__name__}.stats"] = stats

__all__ = ["stats"]
