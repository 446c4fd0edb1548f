"""Train a student: the command ``mdistiller-norm train``."""

import sys

from mdistiller_norm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
