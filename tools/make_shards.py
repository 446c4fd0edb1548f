"""Pack class folders into shards: the command ``mdistiller-norm shards``."""

import sys

from mdistiller_norm.cli import main

if __name__ == "__main__":
    sys.exit(main(["shards", *sys.argv[1:]]))
