"""`seqr bench routing`: every routing method on the same adapters, timed side by side; exactness, search and memory."""
