"""Run the tests of `patch` with other releases of diffusers, and with torchao; write down what passed.

`make versions`; or: python tests/integrations/versions.py diffusers==0.41.0 torchao==0.18.0
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
RELEASES = tuple(f"diffusers=={release}" for release in ("0.39.0", "0.40.0", "0.41.0", "0.42.1"))
TESTS = {
    "diffusers": ["tests/integrations/test_patch.py"],
    "torchao": ["tests/integrations/test_wrappers.py", "-k", "torchao"],
}


def tests_with(release: str, folder: str) -> str:
    """pytest's closing line, with this release before the installed one on the path."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    subprocess.run([*install, release], check=True)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *TESTS[release.split("==")[0]]],
        env={**os.environ, "PYTHONPATH": folder},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = run.stdout.strip().splitlines()
    print(f"{release}: {lines[-1]}", flush=True)
    return re.sub(
        r",? [\d]+ (warnings?|deselected)|, [\d]+ deselected| in .*", "", lines[-1].strip("= ")
    )


def main() -> None:
    rows = ["| release | tests of patched models |", "|---|---|"]
    for release in sys.argv[1:] or (*RELEASES, "torchao==0.18.0"):
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
