"""Draw the paper's figures: the command ``mdistiller-norm visualize``."""

import sys

from mdistiller_norm.cli import main

if __name__ == "__main__":
    sys.exit(main(["visualize", *sys.argv[1:]]))
