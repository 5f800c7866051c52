"""The examples are scripts: what stands beside them is found through their folder, as Python finds it for a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
