"""Settings of all tests: one thread per process, no GPU unless a test asks for it."""

import os

# Before torch is imported anywhere: child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
