"""Check the fast path on this machine's GPU: ``python tools/gpu_check.py [--json FILE] [--steps N]``."""

import sys

from mdistiller_norm.cli import run
from mdistiller_norm.gpu_check import main

if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
