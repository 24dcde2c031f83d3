"""Analysis: alignments, errors, scaling-law fits, memory traffic."""
