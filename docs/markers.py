"""What stands between `<!-- name -->` and `<!-- /name -->` in a page, which a script has written."""

import re
from pathlib import Path


def fill(page: Path, name: str, made: str) -> None:
    """Put `made` there, in lines of its own."""
    before, opening, _, closing, after = re.split(rf"(<!-- {name} -->\n|<!-- /{name} -->)", page.read_text())
    page.write_text("".join([before, opening, made, "\n", closing, after]))
