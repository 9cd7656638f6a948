"""Run notebooks, each in a kernel of its own.

    python .ci/notebooks.py series     run the series at BLT_PRESET into _series/
    python .ci/notebooks.py outputs    put the outputs of that run into the notebooks in nbs/

`make test` runs every notebook through the same `run`.
"""
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert.filters import strip_ansi

ROOT = Path(__file__).resolve().parent.parent
NBS, SERIES, CACHE = ROOT / "nbs", ROOT / "_series", ROOT / "data" / "cache"
DURATIONS = CACHE / "durations.json"  # seconds that notebooks took on this machine, without training
PRESETS = ("ci", "laptop", "gpu")
# A guess where nothing has been measured: slow notebooks at `ci`, and the training of each stage at `laptop`.
SLOW = {"10_stacked": 60, "13_your_text": 60, "bench": 60, "browser": 90, "causality": 60, "distributed": 80,
        "generation_exact": 60, "hostile": 60, "survival": 90}
TRAINS = {"04_entropy": {"entropy": 90}, "08_blt": {"blt-1": 450, "byte": 350}, "10_stacked": {"blt-2": 450}}


def series_notebooks() -> list[Path]:
    "The path in the order to run: the stages by number, then the index, which shows their results."
    return [*sorted(NBS.glob("[0-9][0-9]_*.ipynb")), NBS / "index.ipynb"]


def all_notebooks() -> list[Path]:
    "Every notebook: the index, the path, and what stands beside them."
    found = [path for path in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in path.relative_to(NBS).parts)]
    return sorted(found, key=lambda path: (path.parent, path.stem != "index", path.name))


def code_cells(nb) -> list:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def chromium() -> str | None:
    "Chromium on this machine, or a browser made of it; the checks in a browser need one."
    mac = [f"/Applications/{name}.app/Contents/MacOS/{name}" for name in ("Chromium", "Google Chrome")]
    return next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", *mac])), None)


# --- how long it takes ------------------------------------------------------------------------------------------

def folder_of(kind: str, preset: str) -> Path:
    "Where a preset keeps its `checkpoints` or `results`."
    return ROOT / "data" / kind if preset == "laptop" else CACHE / kind / preset


def training_time(path: Path, preset: str) -> float:
    "A guess of the seconds that a notebook trains, since stages have no checkpoint yet."
    have, stages = folder_of("checkpoints", preset), TRAINS.get(path.stem, {})
    return sum(s for stage, s in stages.items() if not (have / stage).exists()) / (50 if preset == "ci" else 1)


def durations(**more: float) -> dict[str, float]:
    "What the notebooks took on this machine, in seconds, after noting some more."
    known = (json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}) | more
    if more:
        DURATIONS.write_text(json.dumps(known, indent=1))
    return known


def expected(path: Path, preset: str) -> float:
    "The seconds that a notebook is going to take."
    guess = SLOW.get(path.stem, 15) if preset == "ci" else 15
    return durations().get(f"{preset} {path.stem}", guess) + training_time(path, preset)


# --- the runner -------------------------------------------------------------------------------------------------

class Client(NotebookClient):
    "A notebook client that hands what a running cell prints to `heard`."

    @staticmethod
    def heard(text: str) -> None: ...

    def process_message(self, msg, cell, cell_index):
        content = msg["content"]
        if msg["msg_type"] == "stream":
            self.heard(content["text"])
        elif isinstance(label := content.get("data", {}).get("state", {}).get("value"), str):
            self.heard(html.unescape(label))  # a progress bar is a widget whose label is its value
        return super().process_message(msg, cell, cell_index)


def run(path: Path, preset: str, limit: float | None = None, progress=None, **env: str):
    """Run one notebook. Returns it with its outputs, and what went wrong, `None` if nothing did.

    limit: seconds for all cells together. progress: called as `progress("cell 3 of 20", line)` with what a cell begins
    with and what it prints. env: variables of the kernel's environment.
    """
    nb, until = nbformat.read(path, 4), time.monotonic() + (limit or 0)
    sockets = tempfile.TemporaryDirectory()  # in place of ports, which another process may take meanwhile
    kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets.name}/kernel")
    client = Client(nb, kernel, startup_timeout=300, iopub_timeout=60, coalesce_streams=True, store_widget_state=False,
                    resources={"metadata": {"path": str(path.parent)}},
                    timeout_func=lambda cell: max(1, round(until - time.monotonic())) if limit else None)
    CACHE.mkdir(parents=True, exist_ok=True)
    # With IN_TEST the last cell of a notebook doesn't export the package.
    env = os.environ | {"BLT_PRESET": preset, "IN_TEST": "1", "IPYTHONDIR": str(CACHE / "ipython")} | env
    at = "the start"
    try:
        with sockets, client.setup_kernel(env=env, cleanup_kc=True):
            for i, cell in enumerate(nb.cells):
                at = f"cell {i + 1} of {len(nb.cells)}"
                if progress and cell.cell_type == "code":
                    client.heard = lambda text, at=at: progress(at, text)
                    progress(at, re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE).strip().partition("\n")[0])
                client.execute_cell(cell, i)
    except CellExecutionError as error:
        return nb, f"{at} failed:\n" + "\n".join(strip_ansi(error.traceback).rstrip().splitlines()[-15:])
    except CellTimeoutError:
        return nb, f"{at} was still running after {limit:.0f} s in all"
    except DeadKernelError:
        return nb, f"the kernel died in {at}, as it does when memory runs out"
    return nb, None


# --- outputs worth keeping --------------------------------------------------------------------------------------

BAR = re.compile(r"\d+%\||\d+(?:it|B|ex|examples) ?\[\d\d:\d\d|[\d.?]+ ?(?:k|M|G)?(?:it|s|B|examples)/(?:s|it)\b")


def tidy(nb) -> None:
    "Drop, in place, what means nothing after this run: progress bars, widgets without a kernel, this machine's paths."
    def portable(text: str) -> str:
        text = re.sub(r"\S*/ipykernel_\d+/\d+\.py", "<cell>", text).replace(f"{ROOT}{os.sep}", "")
        return text.replace(str(ROOT), ".").replace(str(Path.home()) + os.sep, "~/")

    def keep(output) -> bool:
        if output.output_type == "stream":
            lines = [line for line in output.text.split("\n") if output.name == "stdout" or not BAR.search(line)]
            output.text = portable("\n".join(lines))
            return bool(output.text.strip())
        data = output.get("data", {})
        widget = data.pop("application/vnd.jupyter.widget-view+json", None)
        data.update({kind: portable(value) for kind, value in data.items() if kind.startswith("text/")})
        return not widget or "text/html" in data or not BAR.search(data.get("text/plain", "0%|"))

    for cell in code_cells(nb):
        cell.outputs = [output for output in cell.outputs if keep(output)]


def with_outputs(path: Path):
    "A notebook of nbs/ with the outputs of the last series, that run's preset, and why they don't fit if they don't."
    nb, made = nbformat.read(path, 4), SERIES / path.relative_to(NBS)
    if not made.exists():
        return nb, None, "it hasn't run"
    ran = nbformat.read(made, 4)
    preset, failed = ran.metadata.series.preset, ran.metadata.series.failed
    if failed or [cell.source for cell in code_cells(nb)] != [cell.source for cell in code_cells(ran)]:
        return nb, preset, "it failed" if failed else "its code has changed since it ran"
    for cell, source in zip(code_cells(nb), code_cells(ran)):
        cell.outputs = source.outputs
    return nb, preset, None


def keep_outputs() -> None:
    "Put the outputs of the last series into nbs/. Committed outputs are those of preset `laptop`."
    from nbdev.clean import nbdev_clean
    os.chdir(ROOT)
    for path in series_notebooks():
        nb, preset, reason = with_outputs(path)
        if not reason and preset != "laptop":
            reason = f"it ran at preset {preset}, and committed outputs are those of laptop"
        if not reason:
            nbformat.write(nb, path)
            nbdev_clean(str(path))
        print(f"{path.name}: {f'left alone, since {reason}' if reason else 'has its outputs'}")


# --- the series -------------------------------------------------------------------------------------------------

class Progress:
    "Where the series is and how long it will take: one live line on a terminal, a line every half minute elsewhere."

    def __init__(self, paths: list[Path], preset: str, workers: int):
        self.left = {path: expected(path, preset) for path in paths}  # seconds, or since when it runs the time it ends
        self.running, self.workers = set(), workers
        self.began, self.said, self.live = time.monotonic(), time.monotonic(), sys.stdout.isatty()

    def start(self, path: Path) -> None:
        self.running.add(path)
        self.left[path] += time.monotonic()

    def end(self, path: Path) -> None:
        self.running.remove(path)
        del self.left[path]

    def say(self, path: Path, text: str, passing: bool = False) -> None:
        "A line with the time so far and the time left, which the next one overwrites if it is `passing`."
        self.said = time.monotonic()
        left = sum(max(0, s - self.said) if path in self.running else s for path, s in self.left.items()) / self.workers
        line = f"{timedelta(seconds=int(self.said - self.began))}  ~{left / 60:.0f} min left  {path.stem}: {text}"
        if self.live:
            line = "\r\033[K" + (line[: shutil.get_terminal_size().columns - 1] if passing else line)
        print(line, end="" if passing and self.live else "\n", flush=True)

    def heard(self, path: Path, at: str, printed: str) -> None:
        "What a cell is at."
        line = printed.replace("\r", "\n").strip().rpartition("\n")[2]
        if line and (self.live or time.monotonic() - self.said > 30):
            self.say(path, f"{at}: {line}", passing=True)


def run_series() -> None:
    "Export the package, run the notebooks of the path in order, and show what came of it."
    preset, paths = os.environ.get("BLT_PRESET", "laptop"), series_notebooks()
    if preset not in PRESETS:
        sys.exit(f"BLT_PRESET={preset!r} is not a preset: choose one of {', '.join(PRESETS)}")
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=ROOT, check=True)
    shutil.rmtree(SERIES, ignore_errors=True)
    SERIES.mkdir()
    workers = 1 if any(training_time(path, preset) for path in paths) else 2  # nothing to train: two at a time
    progress = Progress(paths, preset, workers)

    def one(path: Path) -> None:
        trains, began = training_time(path, preset), time.monotonic()
        progress.start(path)
        progress.say(path, f"begins, at preset {preset}", passing=True)
        nb, error = run(path, preset, progress=partial(progress.heard, path),
                        **{"OMP_NUM_THREADS": "1"} if workers > 1 else {})
        seconds = time.monotonic() - began
        progress.end(path)
        progress.say(path, f"{'failed' if error else 'ok'}, {seconds:.0f} s")
        tidy(nb)
        nb.metadata.series = dict(preset=preset, failed=bool(error))
        nbformat.write(nb, SERIES / path.name)
        if error:
            sys.exit(f"\n{path.relative_to(ROOT)}: {error}\n\nas far as it got: _series/{path.name}")
        if not trains and workers == 1:
            durations(**{f"{preset} {path.stem}": round(seconds, 1)})

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(one, path) for path in paths]:
            try:
                done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    from blt_nb.training import results  # of the stages that the notebooks have just trained or loaded
    rows, models = results(), folder_of("checkpoints", preset).relative_to(ROOT)
    columns = [c for c in ("parameters", "bytes_seen", "bpb", "mean_patch", "mean_group", "seconds") if c in rows]
    print(f"\nin {timedelta(seconds=int(time.monotonic() - progress.began))}:\n\n"
          f"{rows[columns].to_string(na_rep='', float_format='{:,.3f}'.format)}\n\n"
          f"models and what is known of them: {models}/   executed notebooks: _series/\n"
          "`make html` makes pages of them; `make outputs` puts their outputs into nbs/ (preset laptop)")


if __name__ == "__main__":
    try:
        {"series": run_series, "outputs": keep_outputs}[sys.argv[1]]()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
