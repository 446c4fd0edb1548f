"""Evaluate weights: ``python tools/eval.py -c FILE [-m MODEL] [-d DATASET] [-bs N] [--per-class]``."""

from mdistiller_norm.cli import eval_main, run

if __name__ == "__main__":
    run(eval_main)
