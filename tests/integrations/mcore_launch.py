"""Runs a script for Megatron on a machine without a GPU: python mcore_launch.py SCRIPT [arguments]."""

import runpy
import sys
import warnings

import mcore_shim
import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore")
sys.argv = sys.argv[1:]
with mcore_shim.OnTheCpu():
    runpy.run_path(sys.argv[0], run_name="__main__")
