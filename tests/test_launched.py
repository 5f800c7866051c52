"""The stand-in for torchrun: what a script prints, the ranks it has, and the end of all where one fails."""

from __future__ import annotations

import time
from pathlib import Path

import launched

MEETS = """
import os, sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
ranks = torch.tensor([float(dist.get_rank())])
dist.all_reduce(ranks)
print(f"{sys.argv[1]} {os.environ['SAID']} {dist.get_world_size()} {ranks.item():g} {__name__} {os.getcwd()}")
"""

FAILS = """
import os, sys, time

time.sleep(60 * (os.environ["RANK"] == "0"))
sys.exit(3)
"""


def test_ranks_meet_in_a_folder_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "meets.py").write_text(MEETS)
    done = launched.torchrun(tmp_path, 2, tmp_path / "meets.py", "hello", SAID="world")
    assert done.returncode == 0, done.stderr
    # Unbuffered ranks write ends of lines apart from lines, and gloo says something too: so lines are not told apart.
    assert done.stdout.count(f"hello world 2 1 __main__ {tmp_path}") == 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_rank_that_fails_ends_the_others_and_a_script_that_hangs_ends_too(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS)
    started = time.monotonic()
    assert launched.torchrun(tmp_path, 2, tmp_path / "fails.py").returncode == 3
    assert launched.torchrun(tmp_path, 1, tmp_path / "fails.py", timeout=1).returncode == 1
    assert time.monotonic() - started < 50
