"""Fill the tables: ``python tools/reproduce.py --table ID [--pairs ...] [--methods ...] [--trials N] [--dry-run]``."""

from mdistiller_norm.cli import run
from mdistiller_norm.reproduce.cli import reproduce_main

if __name__ == "__main__":
    run(reproduce_main)
