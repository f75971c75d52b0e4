"""Paths and settings of the vLLM tests. Set before anything imports torch or vLLM."""

import os
import sys
from pathlib import Path

# for `tiny`, the models that all parts of the suite share
sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
