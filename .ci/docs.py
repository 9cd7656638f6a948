"""Build the documentation site in _docs/: nbdev prepares the notebooks in _proc/, Quarto renders them."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from notebooks import NBS, ROOT
from readable import DIRECTIVE, relink, repository

PROC, DOCS = ROOT / "_proc", ROOT / "_docs"


def finish(path: Path) -> None:
    """What nbdev leaves to do: it has dropped the prose below a title, Quarto would show cells that hold only
    directives, and links out of nbs/ should lead to the repository."""
    def target(link: str, anchor: str) -> str:
        there = PROC / link.removeprefix("nbs/")
        return (os.path.relpath(there, path.parent) if there.exists() else f"{repository()}/{link}") + anchor

    nb = nbformat.read(path, 4)
    nb.cells = [cell for cell in nb.cells if cell.cell_type != "code" or DIRECTIVE.sub("", cell.source).strip()]
    first = nbformat.read(NBS / path.relative_to(PROC), 4).cells[0].source
    nb.cells.insert(1, nbformat.v4.new_markdown_cell(re.sub(r"^# .*|^> .*", "", first, flags=re.MULTILINE)))
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, f"nbs/{path.parent.relative_to(PROC)}", target)
    nbformat.write(nb, path)


if __name__ == "__main__":
    if not shutil.which("quarto"):
        sys.exit("Quarto is not installed: the site needs it (https://quarto.org/docs/get-started/)")
    shutil.rmtree(PROC, ignore_errors=True)
    for command in (["nbdev_sidebar", "--force"], ["nbdev_proc_nbs"]):
        subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], cwd=ROOT, check=True)
    for notebook in PROC.rglob("*.ipynb"):
        finish(notebook)
    subprocess.run(["quarto", "render", "--no-execute"], cwd=PROC, check=True)
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(PROC / "_docs", DOCS)
    print("the site is in _docs/")
