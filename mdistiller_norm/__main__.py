"""Run the command line: ``python -m mdistiller_norm COMMAND ...``."""

import sys

from mdistiller_norm.cli import main

sys.exit(main())
