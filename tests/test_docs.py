"""README and docs run: blocks with a prompt as doctests, the others as scripts, in order, one namespace a page."""

import doctest
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.name)
def test_the_code_of_the_page_runs(page):
    namespace: dict[str, object] = {}
    blocks = BLOCK.findall(page.read_text())
    torch.manual_seed(0)  # a reader's script may draw from the global generator; the test repeats
    for block in blocks:
        if ">>>" in block:
            test = doctest.DocTestParser().get_doctest(block, namespace, page.name, str(page), 0)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            runner.run(test, clear_globs=False)
            namespace.update(test.globs)
            assert runner.summarize(verbose=False).failed == 0
        else:
            exec(compile(block, str(page), "exec"), namespace)  # noqa: S102
    assert namespace


def test_links_between_pages_exist():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
