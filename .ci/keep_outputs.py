"""Copy the outputs of the last `make series` at preset laptop into the notebooks in nbs/, and clean them.

Only outputs are copied, and only into notebooks whose code is still what ran; prose may have changed since.
"""
import json
import os
import subprocess
import sys

import nbformat

from notebooks import NBS, ROOT, series_notebooks

STATE = ROOT / "_series" / "series.json"


def code_cells(nb) -> list:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def problem(path, run: dict | None) -> str | None:
    "Why the outputs of this notebook cannot be kept."
    if run is None:
        return "has not run"
    if run["preset"] != "laptop":
        return f"ran at preset {run['preset']}: committed outputs are those of laptop"
    if run["status"] != "ok":
        return run["status"]
    ran, now = (code_cells(nbformat.read(p, as_version=4)) for p in (STATE.parent / path.name, path))
    if [c.source for c in ran] != [c.source for c in now]:
        return "has other code than what ran"


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
        for cell, source in zip(code_cells(nb), code_cells(ran)):
            cell.outputs = source.outputs
        nbformat.write(nb, path)
        kept.append(path)
    if kept:
        clean = "import sys; from nbdev.clean import nbdev_clean; [nbdev_clean(f) for f in sys.argv[1:]]"
        subprocess.run([sys.executable, "-c", clean, *map(str, kept)], cwd=NBS, check=True, env=dict(os.environ))
    print(f"outputs kept in {len(kept)} notebooks")


if __name__ == "__main__":
    main()
