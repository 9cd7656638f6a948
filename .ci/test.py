"""Every check of the project. The last line is `N passed, N failed`, and the exit status follows it."""
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat

from notebooks import NBS, ROOT, all_notebooks, chromium

WORKERS = 2  # notebooks at a time, each on one core
LIMIT = 900  # seconds for one notebook
LONG = ("10_stacked", "13_scaling", "distributed", "14_gpu", "browser", "hostile", "11_evaluation", "09_generation")  # these begin first, so that no core waits for them in the end
BIN = Path(sys.executable).parent

# A check returns None, or the reason why it failed.


def run(command, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], text=True, encoding="utf-8", errors="replace",
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def tail(text: str, lines: int = 30) -> str:
    return "\n".join(text.rstrip().splitlines()[-lines:])


def copy_of_notebooks(folder: Path) -> Path:
    "A copy of the tree in `folder`, with as much of it as exporting and cleaning need."
    tree = folder / "tree"
    shutil.copytree(NBS, tree / "nbs", ignore=shutil.ignore_patterns(".*", "_*"))
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    (tree / "blt_nb").mkdir()
    if (init := ROOT / "blt_nb" / "__init__.py").exists():  # written by hand but for its version
        shutil.copy(init, tree / "blt_nb")
    return tree


def outside_tests() -> dict:
    "An environment in which nbdev exports: it does not where IN_TEST is set."
    return {name: value for name, value in os.environ.items() if name != "IN_TEST"}


def export_is_current():
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_notebooks(Path(folder))
        done = run([BIN / "nbdev_export"], cwd=tree, env=outside_tests())
        if done.returncode:
            return tail(done.stdout)
        made, kept = ({str(p.relative_to(root)): p.read_bytes() for p in sorted((root / "blt_nb").rglob("*.py"))}
                      for root in (tree, ROOT))
        made["pyproject.toml"], kept["pyproject.toml"] = ((r / "pyproject.toml").read_bytes() for r in (tree, ROOT))
    wrong = [f"{name} differs from its notebook" for name in made.keys() & kept.keys() if made[name] != kept[name]]
    wrong += [f"{name} is missing" for name in made.keys() - kept.keys()]
    wrong += [f"{name} comes from no notebook" for name in kept.keys() - made.keys()]
    return "\n".join([*sorted(wrong), "run .venv/bin/nbdev_export"]) if wrong else None


def notebooks_are_clean():
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_notebooks(Path(folder))
        done = run([BIN / "nbdev_clean"], cwd=tree, env=outside_tests())
        if done.returncode:
            return tail(done.stdout)
        unclean = [path for path in all_notebooks() if (tree / path.relative_to(ROOT)).read_bytes() != path.read_bytes()]
    if unclean:
        return "\n".join([*(f"{path.relative_to(ROOT)} is not clean" for path in unclean), "run .venv/bin/nbdev_clean"])


def no_error_outputs():
    wrong = [f"{path.relative_to(ROOT)}: cell {i + 1} ends in {output.ename}"
             for path in all_notebooks() for i, cell in enumerate(nbformat.read(path, as_version=4).cells)
             for output in cell.get("outputs", []) if output.output_type == "error"]
    return "\n".join(wrong) or None


def readme_is_current():
    import readme

    try:
        text, images = readme.render()
    except (SystemExit, OSError) as error:
        return str(error)
    wrong = []
    if not readme.README.exists() or readme.README.read_text(encoding="utf-8") != text:
        wrong.append("README.md is not what nbs/index.ipynb gives")
    here = readme.owned()
    wrong += [f"nbs/images/{name} is not what nbs/index.ipynb gives"
              for name in sorted(images.keys() | here.keys()) if images.get(name) != here.get(name)]
    return "\n".join([*wrong, "run make readme"]) if wrong else None


def pages_are_whole():
    "The pages of `make html` lead nowhere that is not there, ask no host for anything, and are small."
    import pages

    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        pages.build(pages.read_series(NBS), site, "")
        return "\n".join(pages.problems(site)) or None


def dependencies_agree():
    done = run([sys.executable, "-m", "pip", "check", "--disable-pip-version-check"])
    return tail(done.stdout) if done.returncode else None


BARE_IMPORT = """
import importlib, pkgutil, sys
for name in ("IPython", "ipykernel", "ipywidgets", "jupyter_client", "jupyter_core", "jupyterlab", "nbformat", "nbclient",
             "nbconvert", "nbdev", "execnb", "fastcore", "ghapi", "transformers", "hypothesis", "playwright"):
    sys.modules[name] = None  # importing it fails, and looking for it finds nothing
import blt_nb
names = [m.name for m in pkgutil.walk_packages(blt_nb.__path__, "blt_nb.")]
assert names, "blt_nb has no modules"
for name in names: importlib.import_module(name)
"""


def imports_bare():
    with tempfile.TemporaryDirectory() as folder:
        done = run([sys.executable, "-c", BARE_IMPORT], cwd=folder)
    return tail(done.stdout) if done.returncode else None


def notebook_passes(path: Path):
    "Run one notebook through nbdev_test at the smallest preset."
    with tempfile.TemporaryDirectory() as ipython:
        env = {**os.environ, "BLT_PRESET": "ci", "OMP_NUM_THREADS": "1", "IPYTHONDIR": ipython}
        try:
            done = run([BIN / "nbdev_test", "--path", path, "--n_workers", "0"], cwd=ROOT, env=env, timeout=LIMIT)
        except subprocess.TimeoutExpired as expired:
            return f"still running after {LIMIT} s\n{tail((expired.stdout or b'').decode(errors='replace'))}"
    # nbdev_test also exits with 0 where it ran nothing: only its own word counts.
    return None if done.returncode == 0 and "Success." in done.stdout.splitlines() else tail(done.stdout, 60)


def written_files() -> dict[str, str]:
    "What git sees as new or changed below data/ and nbs/ (notebooks left out: someone may be at work on them)."
    listed = run(["git", "ls-files", "--modified", "--others", "--deleted", "--exclude-standard", "data", "nbs"], cwd=ROOT)
    paths = [] if listed.returncode else [ROOT / line for line in listed.stdout.splitlines()]
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "deleted"
            for path in paths if path.suffix != ".ipynb"}


class Tally:
    def __init__(self):
        self.passed = self.failed = 0

    def report(self, name: str, reason: str | None, seconds: float):
        if reason is None:
            self.passed += 1
            print(f"{name} ... ok ({seconds:.0f} s)", flush=True)
        else:
            self.failed += 1
            print(f"{name} ... FAILED ({seconds:.0f} s)\n" + "\n".join("    " + line for line in reason.splitlines()),
                  flush=True)


def timed(check, *args):
    began = time.monotonic()
    try:
        reason = check(*args)
    except Exception as error:  # a check that breaks has failed, and the others still run
        reason = f"{type(error).__name__}: {error}"
    return reason, time.monotonic() - began


def main():
    tally, before = Tally(), written_files()
    if chromium() is None:
        print("Chromium is not installed: nbs/checks/browser.ipynb skips everything that it would check in a browser", flush=True)
    checks = {
        "the exported package is what the notebooks give": (export_is_current,),
        "notebooks are clean": (notebooks_are_clean,),
        "no notebook shows an error": (no_error_outputs,),
        "README.md is what nbs/index.ipynb gives": (readme_is_current,),
        "the notebooks become pages that need no network": (pages_are_whole,),
        "installed packages agree with each other": (dependencies_agree,),
        "blt_nb imports without Jupyter, nbdev or transformers": (imports_bare,),
    }
    for path in sorted(all_notebooks(), key=lambda path: LONG.index(path.stem) if path.stem in LONG else len(LONG)):
        checks[str(path.relative_to(ROOT))] = notebook_passes, path
    with ThreadPoolExecutor(WORKERS) as pool:
        names = {pool.submit(timed, *check): name for name, check in checks.items()}
        for done in as_completed(names):
            tally.report(names[done], *done.result())

    after = written_files()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    tally.report("the tests leave data/ and nbs/ as they were", "\n".join(changed) or None, 0)
    print(f"{tally.passed} passed, {tally.failed} failed")
    sys.exit(1 if tally.failed else 0)


if __name__ == "__main__":
    main()
