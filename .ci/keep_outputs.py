"""Copy the outputs of the last `make series` at preset laptop into the notebooks in nbs/, and clean them.

Only outputs are copied, and only into notebooks whose cells are still those that ran.
"""
import json
import os
import subprocess
import sys

import nbformat

from notebooks import NBS, ROOT, series_notebooks

STATE = ROOT / "_series" / "series.json"


def problem(path, run: dict | None) -> str | None:
    "Why the outputs of this notebook cannot be kept."
    if run is None:
        return "has not run"
    if run["preset"] != "laptop":
        return f"ran at preset {run['preset']}: committed outputs are those of laptop"
    if run["status"] != "ok":
        return run["status"]
    ran, now = (nbformat.read(p, as_version=4) for p in (STATE.parent / path.name, path))
    if [(c.cell_type, c.source) for c in ran.cells] != [(c.cell_type, c.source) for c in now.cells]:
        return "was edited after it ran"


def main():
    if not STATE.exists():
        sys.exit("no run to take outputs from: run make series first")
    runs = json.loads(STATE.read_text())["notebooks"]
    kept = []
    for path in series_notebooks():
        if why := problem(path, runs.get(path.stem)):
            print(f"left alone: {path.name} {why}")
            continue
        nb, ran = nbformat.read(path, as_version=4), nbformat.read(STATE.parent / path.name, as_version=4)
        for cell, source in zip(nb.cells, ran.cells):
            if cell.cell_type == "code":
                cell.outputs = source.outputs
        nbformat.write(nb, path)
        kept.append(path)
    if kept:
        clean = "import sys; from nbdev.clean import nbdev_clean; [nbdev_clean(f) for f in sys.argv[1:]]"
        subprocess.run([sys.executable, "-c", clean, *map(str, kept)], cwd=NBS, check=True, env=dict(os.environ))
    print(f"outputs kept in {len(kept)} notebooks")


if __name__ == "__main__":
    main()
