"""Build the documentation site in _docs/: nbdev prepares the notebooks in _proc/, Quarto renders them. Nothing is run."""
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat

from notebooks import ROOT, code, relink

PROC, DOCS = ROOT / "_proc", ROOT / "_docs"


def repository() -> str:
    "Where the files of this repository are shown."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return f"{config['DEFAULT']['git_url']}/blob/{config['DEFAULT']['branch']}"


def finish(path: Path, base: str) -> None:
    "Drop cells that hold directives only, which mean nothing to Quarto, and lead links out of nbs/ to the repository."
    def target(linked: str, anchor: str) -> str:
        inside = Path(linked).is_relative_to("nbs")
        return (str(Path(linked).relative_to("nbs")) if inside else f"{base}/{linked}") + anchor

    nb = nbformat.read(path, as_version=4)
    nb.cells = [cell for cell in nb.cells if cell.cell_type != "code" or code(cell)]
    if path.parent == PROC:
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = relink(cell.source, target)
    nbformat.write(nb, path)


def main():
    if not shutil.which("quarto"):
        sys.exit("Quarto is not installed: the site needs it (https://quarto.org/docs/get-started/)")
    shutil.rmtree(PROC, ignore_errors=True)
    subprocess.run([str(Path(sys.executable).parent / "nbdev_proc_nbs")], cwd=ROOT, check=True)
    base = repository()
    for path in sorted(PROC.rglob("*.ipynb")):
        finish(path, base)
    subprocess.run(["quarto", "render", "--no-execute"], cwd=PROC, check=True)
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(PROC / "_docs", DOCS)
    print("the site is in _docs/")


if __name__ == "__main__":
    main()
