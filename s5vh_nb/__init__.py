"""Reproducible notebooks for S5VH and DMMH, hashing with selective state spaces."""

import os

__version__ = "0.1.0"

# Read when torch is loaded: threads that wait go to sleep soon, and the profiler works in silence.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
