"""Export weights: the command ``mdistiller-norm export``."""

import sys

from mdistiller_norm.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
