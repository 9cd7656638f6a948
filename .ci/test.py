"""Every check of the project. The last line is `N passed, N failed`, and the exit status follows it."""
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from notebooks import NBS, ROOT, all_notebooks, chromium, code_cells, durations, expected, run

WORKERS, LIMIT = 2, 900  # notebooks at a time, each with one thread; seconds for one notebook
BIN = Path(sys.executable).parent

# The modules in their order, each of which imports only from those before it, and the lines of code it may have.
BUDGETS = {"files": 195, "data": 150, "transformer": 280, "machines": 88, "saving": 120, "training": 280,
           "entropy": 180, "patching": 360, "drawing": 127, "show": 223, "local": 270, "batching": 75, "model": 350,
           "generation": 167, "uncertainty": 145, "stacked": 285, "controls": 60, "graphs": 107, "speculation": 153,
           "units": 160, "cli": 321, "published": 270, "explorer": 340, "experiments": 1000}
TOTAL, COLUMNS = 5600, 120
LAYOUT = tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER
# What may import from further down: module or notebook, the function or class there, what it imports.
LAZY = {("patching", "patcher_from_dict", "stacked"), ("patching", "patcher_from_dict", "controls"),
        ("model", "BLT", "published"), ("generation", "start", "graphs"), ("generation", "generate", "speculation"),
        ("06_inspecting", "", "explorer")}

# A check returns what is wrong as lines of text, and nothing if all is well.


def command(*parts, **options) -> str:
    "Run a command; the end of what it printed if it failed."
    done = subprocess.run([str(part) for part in parts], text=True, encoding="utf-8", errors="replace",
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    return "\n".join(done.stdout.rstrip().splitlines()[-30:] or ["failed without a word"]) if done.returncode else ""


@contextmanager
def copied(*names: str):
    "A copy of files and folders of the project."
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            there = Path(folder) / name
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, there, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
            else:
                there.parent.mkdir(exist_ok=True)
                shutil.copy(ROOT / name, there)
        yield Path(folder).resolve()


def modules() -> dict[str, Path]:
    "The modules of the package by their names, such as `experiments.runs`."
    found = {path.relative_to(ROOT / "blt_nb"): path for path in sorted((ROOT / "blt_nb").rglob("*.py"))}
    return {".".join(name.with_suffix("").parts): path for name, path in found.items() if name.name[0] != "_"}


def notebooks_are_clean_and_exported() -> str:
    with copied("nbs", "blt_nb/__init__.py", "settings.ini", "pyproject.toml") as tree:
        if failed := command(BIN / "nbdev_export", cwd=tree) or command(BIN / "nbdev_clean", cwd=tree):
            return failed
        made, kept = ({path.relative_to(root): path.read_bytes() for kind in ("blt_nb/**/*.py", "nbs/**/*.ipynb")
                       for path in root.glob(kind) if path.parent.name[0] != "."} for root in (tree, ROOT))
    return "\n".join(f"{name} isn't what nbdev makes of the notebooks: run .venv/bin/nbdev_export and nbdev_clean"
                     for name in sorted(made.keys() | kept.keys()) if made.get(name) != kept.get(name))


def no_notebook_shows_an_error() -> str:
    return "\n".join(f"{path.relative_to(ROOT)}: cell {cell.id} ends in {output.ename}" for path in all_notebooks()
                     for cell in code_cells(nbformat.read(path, 4)) for output in cell.outputs
                     if output.output_type == "error")


def readme_is_current() -> str:
    import readme
    text, images = readme.render()
    same = readme.README.exists() and readme.README.read_text(encoding="utf-8") == text and readme.pictures() == images
    return "" if same else "README.md or its pictures aren't what nbs/index.ipynb gives: run make readme"


def modules_keep_to_their_budgets() -> str:
    lines = dict.fromkeys(BUDGETS, 0)
    for name, path in modules().items():
        with path.open(encoding="utf-8") as file:
            tokens = [token for token in tokenize.generate_tokens(file.readline) if token.type not in LAYOUT]
        name = name.split(".")[0]
        lines[name] = lines.get(name, 0) + len({n for t in tokens for n in range(t.start[0], t.end[0] + 1)})
    lines["all modules"] = sum(lines.values())
    budgets = BUDGETS | {"all modules": TOTAL}
    return "\n".join(f"{name}: {n} lines of code, {budgets.get(name, 0)} are allowed"
                     for name, n in lines.items() if n > budgets.get(name, 0))


def code_fits_the_page() -> str:
    wrong = []
    for path in [*modules().values(), *(ROOT / ".ci").glob("*.py"), ROOT / "setup.py"]:
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"(?ms)^__all__ = .*?\]$", lambda found: "\n" * found[0].count("\n"), text)  # nbdev writes it
        lines = enumerate(text.splitlines(), 1)
        if long := [str(number) for number, line in lines if len(line) > COLUMNS]:
            wrong.append(f"{path.relative_to(ROOT)}: more than {COLUMNS} columns in lines {', '.join(long)}")
    return "\n".join(wrong)


def imports(code: str):
    "What code imports of this package: pairs of the function or class around it and the module."
    for top in ast.parse(code).body:
        for node in ast.walk(top):
            names = []
            if isinstance(node, ast.ImportFrom):
                base = ".".join(filter(None, ["blt_nb" * (node.level > 0), node.module]))
                names = [f"{base}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                names = [getattr(node.args[0], "value", "blt_nb.*")]  # *: a name made at run time
            yield from ((getattr(top, "name", ""), name.split(".")[1]) for name in names if name.startswith("blt_nb."))


def imports_go_upwards() -> str:
    order, wrong, code = list(BUDGETS), [], {}
    for name, path in modules().items():
        code[name] = name, path.read_text(encoding="utf-8"), False
    for path in all_notebooks():
        cells = [cell.source for cell in code_cells(nbformat.read(path, 4))]
        if exported := [cell.split()[2] for cell in cells if cell.startswith("#| default_exp")]:
            code[path.stem] = exported[0], "".join(TransformerManager().transform_cell(cell) for cell in cells), True
    for name, (module, text, itself) in code.items():
        if module in order:
            allowed = ["__version__", *order[:order.index(module) + itself]]
            wrong += [f"{name} imports {used}, which comes after {module}" for where, used in imports(text)
                      if used not in allowed and not {(name, where, used), (module, where, used)} & LAZY]
    return "\n".join(wrong)


def pages_need_no_network() -> str:
    import pages
    with tempfile.TemporaryDirectory() as folder:
        pages.build(pages.read_books(), Path(folder))
        return "\n".join(pages.problems(Path(folder)))


def installed_packages_agree() -> str:
    return command(sys.executable, "-m", "pip", "check", "--disable-pip-version-check")


ALONE = """
import importlib, importlib.metadata, pkgutil, sys
for name in ("IPython", "ipykernel", "ipywidgets", "jupyter_client", "jupyter_core", "jupyterlab", "nbformat",
             "nbclient", "nbconvert", "nbdev", "execnb", "fastcore", "ghapi", "transformers", "hypothesis",
             "playwright"):
    sys.modules[name] = None  # importing it fails, and looking for it finds nothing
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
import blt_nb
assert blt_nb.__file__.startswith(sys.argv[1]), blt_nb.__file__
for module in pkgutil.walk_packages(blt_nb.__path__, "blt_nb."): importlib.import_module(module.name)
for installed in importlib.metadata.distributions(path=[sys.argv[1]]):
    for entry in installed.entry_points: entry.load()
"""


def wheel_works_alone() -> str:
    "The wheel builds, and what is in it imports without Jupyter, nbdev and transformers."
    with copied("blt_nb", "settings.ini", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in") as tree:
        options = "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"
        if failed := command(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", tree / "wheel", tree):
            return failed
        shutil.unpack_archive(next((tree / "wheel").glob("*.whl")), tree / "alone", "zip")
        return command(sys.executable, "-c", ALONE, tree / "alone", cwd=tree / "alone")


def notebook_runs(path: Path) -> str:
    return run(path, "ci", limit=LIMIT, OMP_NUM_THREADS="1")[1] or ""


CHECKS = (modules_keep_to_their_budgets, code_fits_the_page, imports_go_upwards, no_notebook_shows_an_error,
          readme_is_current, notebooks_are_clean_and_exported, installed_packages_agree, wheel_works_alone,
          pages_need_no_network)


def tree() -> dict[Path, int]:
    "The files of data/ and nbs/ that tests should leave alone, and when they were written."
    files = [path for folder in (ROOT / "data", NBS) for path in folder.rglob("*") if path.is_file()]
    ignored = {"cache", ".ipynb_checkpoints", ".hypothesis"}
    return {path: path.stat().st_mtime_ns for path in files if not ignored & {*path.parts}}


def main() -> None:
    passed, failed, took, before = [], [], {}, tree()

    def do(name: str, check, *args) -> None:
        "Check, and say what came of it."
        began = time.monotonic()
        try:
            wrong = check(*args)
        except (Exception, SystemExit) as error:  # a check that breaks has failed, and the others still run
            wrong = f"{type(error).__name__}: {error}"
        (failed if wrong else passed).append(name)
        seconds = round(time.monotonic() - began, 1)
        took.update({f"ci {path.stem}": seconds for path in args})
        lines = [f"{name} ... {'FAILED' if wrong else 'ok'} ({seconds} s)", *wrong.splitlines()]
        print("\n    ".join(lines), flush=True)

    def tests_leave_the_tree_alone() -> str:
        after = tree()
        return "\n".join(f"{path} was written" for path in before.keys() | after.keys()
                         if before.get(path) != after.get(path))

    if not chromium():
        print("Chromium isn't installed: nbs/checks/browser.ipynb skips what it would check in a browser", flush=True)
    with ThreadPoolExecutor(WORKERS) as pool:
        for check in CHECKS:
            pool.submit(do, check.__name__.replace("_", " "), check)
        for path in sorted(all_notebooks(), key=lambda path: -expected(path, "ci")):
            pool.submit(do, str(path.relative_to(ROOT)), notebook_runs, path)
    durations(**took)
    do("tests leave data/ and nbs/ alone", tests_leave_the_tree_alone)
    print(f"{len(passed)} passed, {len(failed)} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)  # without waiting for notebooks that run: a kernel ends when its parent is gone
