"""`python bench/report`, from any folder: the checkout takes this folder's place on the path."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.report.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
