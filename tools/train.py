"""Train a student: ``python tools/train.py --cfg FILE [--resume] [--show] [KEY VALUE ...]``."""

from mdistiller_norm.cli import run, train_main

if __name__ == "__main__":
    run(train_main)
