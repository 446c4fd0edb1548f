"""Write the report: the command ``mdistiller-norm report``."""

import sys

from mdistiller_norm.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
