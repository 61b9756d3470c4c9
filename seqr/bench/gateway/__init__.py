"""``seqr bench gateway``: what the gateway's engine costs beside its peers, and how it bears a crowd."""
