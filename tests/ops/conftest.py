"""Lets the tests of this folder `import backends` and `import triton_aot`, the helpers beside it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
