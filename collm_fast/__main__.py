"""`python -m collm_fast` is `collm-fast`."""

from __future__ import annotations

import sys

from collm_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
