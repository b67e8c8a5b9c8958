"""`make bench`: every performance goal as a ratio measured in one run. Wants the machine to itself."""

import os
import sys

os.environ["TQDM_DISABLE"] = "1"  # the ratios are what is to be read
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.benchmarks import (
    architectures,
    bench_distill,
    bench_experts,
    bench_proofs,
    bench_quantize,
    bench_runner,
    trailing_layer_pruning,
)

if __name__ == "__main__":
    every = (
        architectures,
        bench_distill,
        bench_experts,
        bench_proofs,
        bench_quantize,
        bench_runner,
        trailing_layer_pruning,
    )
    sys.exit(max([benchmark.main() for benchmark in every]))
