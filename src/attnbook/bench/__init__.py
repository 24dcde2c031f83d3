"""Benchmarks: our forms beside the best peers, interleaved in one process.

``python -m attnbook.bench`` prints the table.
"""
