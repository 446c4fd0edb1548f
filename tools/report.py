"""Report the measured runs: ``python tools/report.py [--export csv] [--hparams DIR]``."""

from mdistiller_norm.cli import run
from mdistiller_norm.reproduce.cli import report_main

if __name__ == "__main__":
    run(report_main)
