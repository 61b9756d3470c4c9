"""Every published way to choose among LoRA adapters without training a router, behind one interface, one file each."""
