"""``seqr bench paper``: the experiments of the SEQR paper (arXiv 2509.18093) and this project's own, in one command."""
