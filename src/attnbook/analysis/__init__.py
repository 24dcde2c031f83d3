"""Analysis: alignments, errors, scaling-law fits, symmetries, memory traffic."""
