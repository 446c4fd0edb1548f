"""Train the runs of the paper's tables: the command ``mdistiller-norm reproduce``."""

import sys

from mdistiller_norm.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", *sys.argv[1:]]))
