"""Pack a class-folder tree into shards: ``python tools/make_shards.py --root FOLDER --out FOLDER [--per-shard N]``."""

from mdistiller_norm.cli import run, shards_main

if __name__ == "__main__":
    run(shards_main)
