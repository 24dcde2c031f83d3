"""Keep what the conformance suite measured, for books that are built without running the tests.

    python tools/conformance.py

Reads _build/conformance, which the unit tests wrote, and writes results/conformance.json, with provenance.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from attnbook.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("ATTNBOOK_BUILD") or ROOT / "_build")


def main() -> None:
    """Write the file."""
    paths = sorted((BUILD / "conformance").glob("*.jsonl"))
    if not paths:
        raise SystemExit("nothing measured yet: run make unit")
    lines = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    latest = {(line["name"], line["dtype"], line["causal"], line["grouped"]): line for line in lines}
    outcomes = ",\n".join(json.dumps(line, ensure_ascii=False) for _, line in sorted(latest.items()))
    text = f'{{"provenance": {json.dumps(provenance())},\n"outcomes": [\n{outcomes}\n]}}\n'
    (ROOT / "results" / "conformance.json").write_text(text, encoding="utf-8")
    print(f"{len(latest)} outcomes of {len({key[0] for key in latest})} mechanisms in results/conformance.json")


if __name__ == "__main__":
    main()
