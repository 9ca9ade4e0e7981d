"""Run the tests of `patch` with other releases of diffusers, and with torchao; write down what passed.

`make versions`; or, leaving the page as it is: python tests/integrations/versions.py diffusers==0.41.0
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from small_models import SMALL

from dit_kernels.integrations.inspection import MATRIX

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "diffusers.md"
RELEASES = (*(f"diffusers=={n}" for n in ("0.39.0", "0.40.0", "0.41.0", "0.42.1")), "torchao==0.18.0")  # fmt: skip
TESTS = {
    "diffusers": ["tests/integrations/test_patch.py"],
    "torchao": ["tests/integrations/test_wrappers.py", "-k", "torchao"],
}

Results = dict[str, bool]  # a test with its parameters -> whether it passed


def tests_with(release: str) -> Results:
    """With this release before the installed one on the path."""
    with tempfile.TemporaryDirectory() as folder:
        install = [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, release,
        ]  # fmt: skip
        subprocess.run(install, check=True)
        report = Path(folder) / "junit.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *TESTS[release.split("==")[0]]],
            env={**os.environ, "PYTHONPATH": folder},
            cwd=ROOT,
        )  # fmt: skip
        cases = ElementTree.parse(report).iter("testcase")
        return {case.attrib["name"]: len(case) == 0 for case in cases}


def rows(results: dict[str, Results]) -> Iterator[str]:
    """A Markdown table: a class of diffusers by release, then every test."""
    yield "| | " + " | ".join(results) + " |"
    yield "|---|" + "---|" * len(results)
    small = defaultdict(list)
    for key, model in SMALL.items():
        small[model.kind].append(key)
    for kind in dict.fromkeys(kind for kind, _ in MATRIX.values()):
        cells = (_gradients(found, small[kind]) for found in results.values())
        yield f"| `{kind}` | {' | '.join(cells)} |"
    counts = (f"{sum(found.values())} of {len(found)} tests" for found in results.values())
    yield f"| all | {' | '.join(counts)} |"


def _gradients(found: Results, keys: list[str]) -> str:
    names = {
        f"test_forward_and_gradients_by_the_accuracy_rule[{key}-{dtype}]"
        for key in keys
        for dtype in ("torch.float32", "torch.bfloat16")
    }
    if not names & found.keys():
        return ""
    return "forward, backward" if all(found.get(name) for name in names) else "fails"


def main() -> None:
    results = {release: tests_with(release) for release in sys.argv[1:] or RELEASES}
    table = "\n".join(rows(results))
    print(table)
    if sys.argv[1:]:
        return
    page = re.sub(
        r"(?<=<!-- versions -->\n).*?(?=\n<!-- /versions -->)",
        lambda _: table,
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
