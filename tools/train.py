"""Train a student: ``python tools/train.py --cfg FILE [--resume] [--show] [KEY VALUE ...]``."""

from mdistiller_norm.cli import train_main, run

if __name__ == "__main__":
    run(train_main)
