"""The paper's figures: ``python tools/visualize.py {tsne,correlation,logits,curves} ... [--out STEM] [--data]``."""

from mdistiller_norm.analysis.cli import visualize_main
from mdistiller_norm.cli import run

if __name__ == "__main__":
    run(visualize_main)
