"""Benchmarks that reproduce the papers and measure this project beside its peers: ``seqr bench``."""
