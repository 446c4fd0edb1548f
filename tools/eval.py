"""Evaluate weights: the command ``mdistiller-norm eval``."""

import sys

from mdistiller_norm.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
