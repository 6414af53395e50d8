"""Decode kernels in CUDA C++ for NVIDIA's GPUs; compiled where they run, by NVIDIA's run-time compiler."""

from pathlib import Path

SOURCES = Path(__file__).parent
"""Where ``decode.cu`` and what it includes lie."""
