"""Count what contenders allocate on a GPU, without one: `python bench/memory_model.py OUT.json`.

See suite/fake_memory.py; `python bench/page.py OUT.json` puts the table into docs/performance.md.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from pathlib import Path

# Explicit, so that it also works where PYTHONSAFEPATH keeps the script's folder off the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import machine
from suite import fake_memory


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(arguments[0])
    rows = list(fake_memory.table(lambda text: print(text, file=sys.stderr), quick=False))
    content = {
        "schema": 1,
        "command": f"python bench/memory_model.py {out}",
        "commit": machine.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "memory_model": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
