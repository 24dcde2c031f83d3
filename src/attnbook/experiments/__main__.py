"""Run an experiment from the command line."""

from __future__ import annotations

import argparse
import json
from importlib import import_module

from attnbook.experiments import NAMES, run_grid


def _setting(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run.

    Args:
        arguments: those of the command line by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m attnbook.experiments", description="Run a grid and store its results."
    )
    parser.add_argument("name", choices=sorted(NAMES))
    parser.add_argument(
        "only", nargs="*", type=_setting, metavar="KEY=VALUE", help="run only the cells with these settings"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--folder", default="results")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(options.threads)
    experiment = import_module(f"attnbook.experiments.{NAMES[options.name]}").EXPERIMENT
    print(run_grid(experiment, folder=options.folder, only=dict(options.only), device=options.device))


if __name__ == "__main__":
    main()
