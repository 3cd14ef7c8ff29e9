"""Build the site: python -m docs [DIRECTORY], from `scripts/`; build/site by default."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from docs import llms, pages
from docs.names import PublicName


def missing(names: Iterable[PublicName], inventory: Iterable[str]) -> list[str]:
    """Return the public names that a built site does not document."""
    documented = set(inventory)
    return [one.name for one in names if one.name not in documented]


def build(into: Path) -> list[PublicName]:
    """Build the site, in which a warning (a broken link, say) is an error.

    Raises:
        RuntimeError: Sphinx warned, or a public name is in no page.
    """
    from sphinx.cmd.build import build_main
    from sphinx.util.inventory import InventoryFile

    settings = Path(__file__).parent
    shutil.rmtree(into, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        sources = Path(work)
        names = pages.write_sources(sources)
        options = ["-W", "--keep-going", "-q", "-b", "html", "-c", str(settings)]
        status = build_main([*options, "-d", f"{work}/.doctrees", str(sources), str(into)])
    if status:
        raise RuntimeError("the site has warnings, which are above")
    with open(into / "objects.inv", "rb") as file:
        found = InventoryFile.load(file, "", lambda base, uri: uri)
    lacking = missing(names, (name for kind in found.values() for name in kind))
    if lacking:
        raise RuntimeError(f"the site documents all public names but {lacking}")
    text = llms.text(names, pages.readme())
    (into / "llms.txt").write_text(text, encoding="utf-8")
    return names


if __name__ == "__main__":
    where = Path(sys.argv[1] if len(sys.argv) > 1 else pages.ROOT / "build" / "site")
    print(f"{len(build(where))} public names: {where}/index.html")
