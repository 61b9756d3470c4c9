"""The parts of ``benchmarks/gpu_bench.py``."""
