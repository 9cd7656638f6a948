"""Put a Colab badge into each notebook of the path, and a hidden cell that does nothing but on Colab, where it clones
the repository (notebooks read the books and checkpoints in data/) and installs what it needs; or bring both up to date.

Run by hand, before `make series`: a notebook whose code has changed can't take the outputs of an earlier run.
"""
import re
from configparser import ConfigParser

import nbformat

from notebooks import ROOT, code_cells, series_notebooks
from readable import repository

CELL, CLONE = "colab-install", "/content/blt_nb"
EXTRA = "nbdev", "hypothesis", "transformers"  # development requirements that Colab lacks, or has too old


def with_badge(nb, name: str, wanted: list[str]):
    "The same notebook, with badge and cell where they belong. wanted: the requirements that it may need on top."
    base, first = repository(), nb.cells[0]
    nb.cells = [cell for cell in nb.cells if cell.id != CELL]
    code = "\n".join(cell.source for cell in code_cells(nb))
    needs = [f'"{line}"' for line in wanted if re.search(rf"(from|import) {re.match('[a-z]+', line)[0]}\b", code)]
    link = f"{base.replace('github.com', 'colab.research.google.com/github')}/nbs/{name}"
    text = re.sub(r"\n*^\[!\[Open in Colab\].*$", "", first.source, flags=re.MULTILINE)
    badge = rf"\g<0>\n\n[![Open in Colab](images/colab.svg)]({link})"  # below the question
    first.source = re.sub(r"^> .*$", badge, text, count=1, flags=re.MULTILINE)
    nb.cells.insert(1, nbformat.v4.new_code_cell(id=CELL, source="\n".join([
        "#| hide", "import sys", 'if "google.colab" in sys.modules: # elsewhere there is nothing to do',
        f"    !git clone -q --depth 1 {base.partition('/blob/')[0]} {CLONE}",
        f"    %pip install -q {' '.join([CLONE, *needs])}", f"    %cd -q {CLONE}/nbs"])))
    return nb


if __name__ == "__main__":
    (config := ConfigParser(delimiters=["="])).read(ROOT / "settings.ini", encoding="utf-8")
    wanted = [line for line in config["DEFAULT"]["dev_requirements"].split() if line.startswith(EXTRA)]
    for path in series_notebooks()[:-1]:  # without the index
        nbformat.write(with_badge(nbformat.read(path, 4), path.name, wanted), path)
