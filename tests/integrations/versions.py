"""Run the tests of `patch` with other releases of diffusers, and write down what passed.

`make versions`; or: python tests/integrations/versions.py 0.41.0 0.42.1
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "diffusers.md"
RELEASES = ("0.39.0", "0.40.0", "0.41.0", "0.42.1")
TESTS = "tests/integrations/test_patch.py"


def tests_with(release: str, folder: str) -> str:
    """pytest's closing line, with this release before the installed one on the path."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    subprocess.run([*install, f"diffusers=={release}"], check=True)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", TESTS],
        env={**os.environ, "PYTHONPATH": folder},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = run.stdout.strip().splitlines()
    print(f"diffusers {release}: {lines[-1]}", flush=True)
    return re.sub(r" in .*", "", lines[-1].strip("= "))


def main() -> None:
    rows = ["| diffusers | tests of every family of the table above |", "|---|---|"]
    for release in sys.argv[1:] or RELEASES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(f"| {release} | {tests_with(release, folder)} |")
    table = "\n".join(rows)
    page = re.sub(
        r"(?<=<!-- versions -->\n).*?(?=\n<!-- /versions -->)",
        lambda _: table,
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
