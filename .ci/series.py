"""Run the series: every notebook in order, each in its own kernel, and show what came of it.

    python .ci/series.py [--only 04_entropy 05_patching]

The preset comes from BLT_PRESET. Executed notebooks and one page each go to _series/, with an index.html.
"""
import argparse
import csv
import html
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert.filters import strip_ansi

from notebooks import NBS, ROOT, code, preset, series_notebooks, tidy_outputs, title
from pages import page, page_name

OUT = ROOT / "_series"
STATE = OUT / "series.json"
NOTABLE = 5  # seconds after which a running cell is worth a line of its own
AGAIN = 60  # seconds after which a cell that still runs is mentioned again


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    "Which notebook and cell runs, and the time so far: one live line on a terminal, a line for each slow cell elsewhere."

    def __init__(self):
        self.began, self.live = time.monotonic(), sys.stdout.isatty()
        self.lock, self.cell, self.stop = threading.Lock(), None, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()
        self._clear()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def start_cell(self, notebook: str, i: int, n: int, source: str):
        with self.lock:
            self.cell = dict(where=f"{notebook}  cell {i}/{n}", source=source, began=time.monotonic(), said=0, tail="")

    def end_cell(self):
        with self.lock:
            self.cell = None

    def heard(self, text: str):
        "The last line that the running cell printed, such as a progress bar."
        lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
        with self.lock:
            if lines and self.cell:
                self.cell["tail"] = lines[-1]

    def say(self, line: str):
        "A line that stays."
        with self.lock:
            self._clear()
            print(line, flush=True)

    def _clear(self):
        if self.live:
            print("\r\033[K", end="", flush=True)

    def _watch(self):
        while not self.stop.wait(0.5):
            with self.lock:
                if not (cell := self.cell):
                    continue
                ran = time.monotonic() - cell["began"]
                line = f"{clock(self.elapsed):>8}  {cell['where']}  {cell['source']}"
                if self.live:
                    line += f"  ({clock(ran)})" + (f"  {cell['tail']}" if cell["tail"] else "")
                    print("\r\033[K" + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
                elif ran > (NOTABLE if not cell["said"] else cell["said"] + AGAIN):
                    print(line + (f"  (running for {clock(ran)})" if cell["said"] else ""), flush=True)
                    cell["said"] = ran


class Client(NotebookClient):
    "A notebook client that uses this environment's kernel and tells `progress` what a running cell prints."
    progress: Progress

    def create_kernel_manager(self):
        # Only the kernel installed beside this interpreter, whatever kernels the user has registered elsewhere.
        specs = KernelSpecManager(kernel_dirs=[str(Path(sys.prefix) / "share" / "jupyter" / "kernels")])
        self.km = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs, transport_encryption="auto")
        return self.km

    def process_message(self, msg, cell, cell_index):
        content = msg["content"]
        if msg["msg_type"] == "stream":
            self.progress.heard(content["text"])
        elif msg["msg_type"] == "comm_msg":  # a notebook's progress bar is a widget whose label is its value
            label = content["data"].get("state", {}).get("value")
            if isinstance(label, str):
                self.progress.heard(html.unescape(label))
        return super().process_message(msg, cell, cell_index)


def execute(path: Path, progress: Progress):
    """Run one notebook; return it with its outputs, and `None` or what went wrong as `(cell number, cell, error)`."""
    nb = nbformat.read(path, as_version=4)
    client = Client(nb, timeout=None, coalesce_streams=True, store_widget_state=False,
                    resources={"metadata": {"path": str(NBS)}})
    client.progress = progress
    env = {**os.environ, "BLT_PRESET": preset()}
    failed = None
    try:
        with client.setup_kernel(env=env):
            for i, cell in enumerate(nb.cells):
                if cell.cell_type != "code":
                    continue
                first = next((line.strip() for line in code(cell).splitlines() if line.strip()), "")
                progress.start_cell(path.stem, i + 1, len(nb.cells), first[:50])
                try:
                    client.execute_cell(cell, i)
                except CellExecutionError as error:
                    failed = (i + 1, cell, strip_ansi(error.traceback))
                    break
                except DeadKernelError:
                    failed = (i + 1, cell, "The kernel died, as it does when memory runs out.")
                    break
    finally:
        progress.end_cell()
    tidy_outputs(nb)
    return nb, failed


INDEX = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>The series</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }} td, th {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #8886 }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums }}
</style>
<h1>The series</h1><p>Preset <code>{preset}</code>, {total} in all.</p>
<table><tr><th>notebook<th>about<th>time<th>status</tr>
{rows}
</table></html>
"""


def write_index(state: dict):
    order = [path.stem for path in series_notebooks()]
    done = [(name, state["notebooks"][name]) for name in order if name in state["notebooks"]]
    rows = "\n".join(
        f'<tr><td><a href="{page_name(name)}">{name}</a><td>{html.escape(r["title"])}'
        f'<td class="number">{clock(r["seconds"])}<td>{html.escape(r["status"])}</tr>' for name, r in done)
    total = clock(sum(r["seconds"] for _, r in done))
    (OUT / "index.html").write_text(INDEX.format(preset=state["preset"], total=total, rows=rows), encoding="utf-8")
    STATE.write_text(json.dumps(state, indent=1), encoding="utf-8")


# --- the closing table ------------------------------------------------------------------------------------------

def results_file(name: str) -> Path:
    "Where `blt_nb.training.record_result` writes at a preset; the committed results are those of `laptop`."
    return ROOT / ("data/results/series.csv" if name == "laptop" else f"data/cache/results/{name}/series.csv")


def number(row: dict, column: str, form="{:,.2f}") -> str:
    "A cell of the table as text; empty where the stage has no such number."
    try:
        return form.format(float(row[column]))
    except (KeyError, TypeError, ValueError):
        return ""


def closing_table(name: str) -> str:
    path = results_file(name)
    if not path.exists():
        return f"no results yet: {path.relative_to(ROOT)} is not there"
    with path.open(newline="", encoding="utf-8") as f:
        rows = [row for row in csv.DictReader(f) if row.get("preset") == name]
    head = ["stage", "parameters", "bytes seen", "bpb", "mean patch (bytes)", "mean group (patches)", "time"]
    body = [[row.get("stage") or "", number(row, "parameters", "{:,.0f}"), number(row, "bytes_seen", "{:,.0f}"),
             number(row, "bpb", "{:.3f}"), number(row, "mean_patch"), number(row, "mean_group"),
             clock(float(seconds)) if (seconds := number(row, "seconds", "{}")) else ""] for row in rows]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = ["  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths)))
             for line in [head, ["-" * w for w in widths], *body]]
    return "\n".join(lines)


# --- the run ----------------------------------------------------------------------------------------------------

def choose(only: list[str] | None) -> list[Path]:
    paths = series_notebooks()
    if not paths:
        sys.exit("nbs/ holds no notebook of the series")
    if not only:
        return paths
    known = {path.stem: path for path in paths}
    wanted = [name.removesuffix(".ipynb") for name in only]
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"no such notebook: {', '.join(unknown)}; the series has {', '.join(known)}")
    return [path for path in paths if path.stem in wanted]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NOTEBOOK", help="run these notebooks only, such as 04_entropy")
    args = parser.parse_args()
    name, paths = preset(), choose(args.only)
    if not args.only:
        shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(exist_ok=True)
    state = json.loads(STATE.read_text()) if STATE.exists() else {"notebooks": {}}
    state["preset"] = name
    pages = [path.stem for path in series_notebooks()]

    print(f"{len(paths)} notebooks at preset {name}, trained from scratch, into {OUT.name}/", flush=True)
    with Progress() as progress:
        for path in paths:
            began = time.monotonic()
            nb, failed = execute(path, progress)
            seconds = time.monotonic() - began
            nbformat.write(nb, OUT / path.name)
            (OUT / page_name(path.stem)).write_text(page(nb, path.stem, pages, ".."), encoding="utf-8")
            status = f"failed in cell {failed[0]}" if failed else "ok"
            state["notebooks"][path.stem] = {"title": title(nb), "seconds": seconds, "status": status, "preset": name}
            write_index(state)
            progress.say(f"{clock(progress.elapsed):>8}  {path.stem}  {status}, {clock(seconds)}")
            if failed:
                report_failure(path, *failed, cells=len(nb.cells))
                sys.exit(1)

    print(f"\n{closing_table(name)}\n")
    models = "data/checkpoints/" if name == "laptop" else f"data/cache/checkpoints/{name}/"
    print(f"pages: _series/index.html   models: {models}   results: {results_file(name).relative_to(ROOT)}")


def report_failure(path: Path, number: int, cell, error: str, cells: int):
    tail = "\n".join(error.rstrip().splitlines()[-30:])
    source = "\n".join("    " + line for line in cell.source.splitlines())
    print(f"\n{path.relative_to(ROOT)} failed in cell {number} of {cells}:\n\n{source}\n\n{tail}\n\n"
          f"as far as it got: _series/{path.name} and _series/{page_name(path.stem)}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
