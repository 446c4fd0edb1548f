"""Export weights for use elsewhere: ``python tools/export.py -c FILE [-o FILE] [--format pt2|onnx|state_dict]``."""

from mdistiller_norm.cli import run
from mdistiller_norm.export import export_main

if __name__ == "__main__":
    run(export_main)
