"""Scripts beside the tests, each in a process of its own: what they define or import must not stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def said(script: str, *arguments: str, timeout: float = 250, **environment: str) -> str:
    """What a script of this folder prints; it ends well, or the test fails with all that it said."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
