"""Does a pinned version have a known advisory? Run by `make audit`; asks the package index, through pip-audit.

Where none can be asked (no network, or a mirror without advisories) it says so and is no failure.
"""

import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"


def main() -> int:
    """1 if a pin has an advisory."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(CONSTRAINTS), "--no-deps", "--disable-pip", "-f", "json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    try:
        audited = json.loads(result.stdout)["dependencies"]
    except ValueError:
        print(f"skipped: pip-audit could ask nobody ({(result.stderr.strip().splitlines() or ['no word'])[-1][:200]})")
        return 0
    known = [one for one in audited if "skip_reason" not in one]
    for one in known:
        for advisory in one["vulns"]:
            fixed = ", ".join(advisory["fix_versions"]) or "no version yet"
            print(f"{one['name']} {one['version']}: {advisory['id']}; fixed in {fixed}")
    if not known:
        print(f"skipped: the package index knows none of the {len(audited)} pins, so it tells no advisories")
    else:
        print(f"{len(known)} of {len(audited)} pins were looked up")
    return 1 if any(one["vulns"] for one in known) else 0


if __name__ == "__main__":
    sys.exit(main())
