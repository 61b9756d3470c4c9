"""Routing and the adapters' share on a GPU, in Triton. Needs triton; nothing else in ``seqr`` imports this package.

With TRITON_INTERPRET=1 in the environment before triton is first imported, the same kernels run on the CPU (slowly).
"""
