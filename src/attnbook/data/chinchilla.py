"""Points read off a published figure: the training runs of Chinchilla."""

from __future__ import annotations

import csv
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnbook.data.base import Card, Source

CARDS = {
    "chinchilla": Card(
        name="chinchilla",
        title="Training runs in figure 4 of the Chinchilla paper",
        content="245 runs: parameters, training compute and final loss, read off the vector graphics of the paper's "
        "figure 4 by Besiroglu et al.",
        licence="none stated: load it, do not redistribute it",
        citation=("besiroglu2024", "hoffmann2022"),
        home="https://github.com/epoch-research/analyzing-chinchilla",
        returns="Runs. No options.",
        sources=(
            Source(
                "svg_extracted_data.csv",
                "193478df4e90f040016431996c45682659306840ecdadf83cfb9cd5ca0aa1b30",
                "https://raw.githubusercontent.com/epoch-research/analyzing-chinchilla/main/data/svg_extracted_data.csv",
            ),
        ),
        note="The loss is read off a colour scale, and so less exact than the other two.",
    )
}


class Runs(NamedTuple):
    """Training runs, one entry of each array a run.

    Attributes:
        parameters: N.
        tokens: D, from C = 6 N D.
        compute: C, in floating-point operations.
        loss: the final loss, in nats a token.
    """

    parameters: NDArray[np.float64]
    tokens: NDArray[np.float64]
    compute: NDArray[np.float64]
    loss: NDArray[np.float64]


def _load() -> Runs:
    content = CARDS["chinchilla"].read("svg_extracted_data.csv").decode("utf-8")
    rows = list(csv.DictReader(content.splitlines()))
    parameters, compute, loss = (
        np.array([float(row[name]) for row in rows]) for name in ("Model Size", "Training FLOP", "loss")
    )
    return Runs(parameters, compute / (6 * parameters), compute, loss)


LOADERS = {"chinchilla": _load}
