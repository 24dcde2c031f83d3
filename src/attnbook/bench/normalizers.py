"""Sparse normalisers beside the package ``entmax``, whose functions sort."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attnbook import normalizers
from attnbook.bench.case import Comparison


def suite() -> Iterator[Comparison]:
    """Yield the comparisons of sparsemax and entmax15: rows of scores drawn from a normal distribution, forward.

    Raises:
        ImportError: the package ``entmax`` is not installed.
    """
    import entmax

    def scores(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0))

    for name in ("sparsemax", "entmax15"):
        ours, theirs = getattr(normalizers, name), getattr(entmax, name)
        compiled = torch.compile(ours, fullgraph=True)
        for rows, k, form, function, goal in (
            (scores(4096, 512), None, "eager", ours, 0.2),
            (scores(4096, 512), None, "compiled", compiled, 0.05),
            (scores(64, 32000), 100, "eager", ours, 1.0),
        ):
            yield Comparison(
                suite="normalizers",
                what=f"{name}, {form}, forward",
                setting=f"{tuple(rows.shape)} float32",
                ours=lambda function=function, rows=rows: function(rows),
                peers={f"entmax, k={k}": lambda theirs=theirs, rows=rows, k=k: theirs(rows, k=k)},
                goal=goal,
            )
