import subprocess
import sys

from overparam.support import allocator

CODE = """
import numpy as np, resource
from overparam.support.allocator import keep_freed_memory
assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23)  # 64 MB, above the threshold from which glibc maps memory anew by default
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def test_freed_memory_is_used_again_without_new_pages():
    if allocator.platform.libc_ver()[0] != "glibc":
        return
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # 16,384 pages otherwise


def test_without_glibc_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("musl", "1"))
    assert allocator.keep_freed_memory() is False
