"""Train from the command line."""

from __future__ import annotations

import argparse
import sys

from attnbook.data import DataUnavailable


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and train.

    Args:
        arguments: those of the command line by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m attnbook.train",
        description="Train a Decoder as a configuration says; the same command again resumes a run that was stopped.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="training.steps=100, say")
    options = parser.parse_args(arguments)
    from attnbook.train.checkpoints import CheckpointError
    from attnbook.train.config import read
    from attnbook.train.loop import NonFiniteLoss
    from attnbook.train.run import run

    try:
        run(read(options.config, options.changes))
    except (ValueError, CheckpointError, DataUnavailable, NonFiniteLoss) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
