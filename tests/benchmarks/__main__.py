"""`make bench`: every performance goal as a ratio measured in one run. Wants the machine to itself."""

import os
import sys

os.environ["TQDM_DISABLE"] = "1"  # the ratios are what is to be read

from tests.benchmarks import bench_distill, bench_experts, trailing_layer_pruning

if __name__ == "__main__":
    sys.exit(max(bench_distill.main(), bench_experts.main(), trailing_layer_pruning.main()))
