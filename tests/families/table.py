"""The table of docs/families.md: ``python -m tests.families.table`` makes it, of what tests have found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bpwise.checkpoint.model.families import is_known
from bpwise.convert.exl2.readers.table import reader_composite, reader_family

from .families import FAMILIES
from .models import family_config

__all__ = ["DOC", "RESULTS", "exl2_mark", "family_table", "with_table"]

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "families.md"
RESULTS = ROOT / "build" / "families"
"""Where a run of the tests leaves what it finds, one file a family."""

COMMITTED = Path(__file__).parent / "results.json"
"""What the table says of each family, until a run finds something else."""

BEGIN, END = "<!-- made by tests/families/table.py -->", "<!-- end -->"
COLUMNS = ("model type", "released as", "EXL2", "GGUF", "vision", "MTP", "what is special", "gate")


def family_table() -> str:
    """Return the table, as Markdown."""
    results = json.loads(COMMITTED.read_text(encoding="utf-8"))
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(_row(name, results.get(name)) for name in sorted(FAMILIES))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(text: str) -> str:
    """Return a page with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{family_table()}\n{END}{after}"


def _row(name: str, found: dict[str, float] | None) -> tuple[str, ...]:
    family = FAMILIES[name]
    config = family_config(name) if family.tried else {"model_type": name}
    vision = not family.tried or "vision_config" in config
    special = family.special + (f"; {family.known_miss}" if family.known_miss else "")
    gguf = "not tried" if found is None else f"{found['nats']:.3f} ({found['their_nats']:.3f})"
    gate = "" if found is None else f"{found['gate_nats']:.0e}"
    return (
        f"`{config['model_type']}`",
        family.releases,
        exl2_mark(config),
        gguf,
        "yes" if vision else "",
        "yes" if family.mtp else "",
        special,
        gate,
    )


def exl2_mark(config: dict[str, Any]) -> str:
    """Return what the table says of EXL2: ``yes``, or `` `--force` ``, or nothing."""
    if reader_composite(config).architectures or reader_family(config).architectures:
        return "yes"
    return "`--force`" if is_known(config) else ""


def main() -> None:
    """Take over what the tests have found, and write the table."""
    results = json.loads(COMMITTED.read_text(encoding="utf-8")) if COMMITTED.exists() else {}
    for path in RESULTS.glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        results[path.stem] = {
            key: found[key] for key in ("gate_nats", "reader_nats", "nats", "their_nats", "plain_nats")
        }
    COMMITTED.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", encoding="utf-8")
    DOC.write_text(with_table(DOC.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
