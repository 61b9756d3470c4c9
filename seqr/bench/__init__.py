"""Benchmarks: what the README and docs/benchmarks claim, measured again by one command each."""
