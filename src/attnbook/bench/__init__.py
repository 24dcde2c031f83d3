"""Benchmarks: our forms beside the best peers, interleaved in one process.

``python -m attnbook.bench`` prints the table and stores it in ``results/bench.json``; ``python -m
attnbook.bench.choose`` makes anew the table by which ``backend="auto"`` chooses.
"""

# Modules of this package, each with a ``suite()``; in the order of the table.
SUITES = ("dense", "sparse", "linear", "normalizers", "graph", "state", "decoding", "training", "gpu")
BESIDE_NANOGPT = ("decoding", "training")  # their suite() takes the place of nanoGPT's model.py
