"""What the scripts in this folder share: where things are, and how a notebook is shown outside Jupyter."""
import os
import posixpath
import re
import shutil
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PRESETS = ("ci", "laptop", "gpu")


def preset() -> str:
    "The preset that BLT_PRESET names, `laptop` if it names none."
    name = os.environ.get("BLT_PRESET", "laptop")
    if name not in PRESETS:
        sys.exit(f"BLT_PRESET={name!r} is not a preset: choose one of {', '.join(PRESETS)}")
    return name


def series_notebooks() -> list[Path]:
    "The notebooks of the series in the order to run: the stages by number, then the index, which shows their results."
    index = NBS / "index.ipynb"
    return sorted(NBS.glob("[0-9][0-9]_*.ipynb")) + ([index] if index.exists() else [])


def all_notebooks() -> list[Path]:
    "Every committed notebook: the series and the checks."
    return series_notebooks() + sorted((NBS / "checks").glob("*.ipynb"))


def chromium() -> str | None:
    "Chromium on this machine, or a browser made of it; the checks in a browser need one."
    names = ("chromium", "chromium-browser", "google-chrome", "/Applications/Chromium.app/Contents/MacOS/Chromium",
             "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
    return next(filter(None, map(shutil.which, names)), None)


def title(nb) -> str:
    "The first heading of a notebook."
    for cell in nb.cells:
        if cell.cell_type == "markdown" and (found := re.search(r"^#+\s+(.+)$", cell.source, re.MULTILINE)):
            return found[1].strip()
    return "untitled"


# --- directives: the `#|` lines at the top of a code cell -------------------------------------------------------

_DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")


def directives(cell) -> dict[str, str]:
    "The directives of a cell, such as `{'hide': '', 'echo': 'false'}`."
    lines = cell.source.splitlines() if cell.cell_type == "code" else []
    return {m[1]: m[2] for line in lines if (m := _DIRECTIVE.match(line))}


def code(cell) -> str:
    "The source of a cell without its directives."
    return "\n".join(line for line in cell.source.splitlines() if not _DIRECTIVE.match(line)).strip("\n")


def visible(nb):
    "A copy of the notebook as a reader sees it: hidden cells, hidden sources and directives left out."
    nb = nbformat.from_dict(nb)
    cells = []
    for cell in nb.cells:
        flags = directives(cell)
        if "hide" in flags or flags.get("include") == "false" or "default_exp" in flags and not code(cell):
            continue
        if cell.cell_type == "code":
            cell.metadata["alt"] = flags.get("fig-alt", "").strip("\"'")
            cell.metadata["echo"] = flags.get("echo") != "false"
            cell.source = code(cell)
            if flags.get("output") == "false":
                cell.outputs = []
        cells.append(cell)
    nb.cells = cells
    nb.metadata["language_info"] = {"name": "python"}
    return nb


# --- links ------------------------------------------------------------------------------------------------------

_LINK = re.compile(r"""(\]\(\s*<?|(?:href|src)=["'])([^)\s"'>]+)""")
_CODE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)[^\S\n]*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def relink(markdown: str, new_target) -> str:
    """Replace each relative link of a notebook in nbs/ by what `new_target(path, anchor)` gives.

    `path` is relative to the repository root. Code, absolute addresses and links within the page stay as they are.
    """
    def one(match):
        lead, target = match.groups()
        if re.match(r"[a-zA-Z][\w+.-]*:|/|#", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        return lead + new_target(posixpath.normpath(posixpath.join("nbs", path)), hash_ + anchor)

    parts = _CODE.split(markdown)
    return "".join(part if i % 2 else _LINK.sub(one, part) for i, part in enumerate(parts))


# --- outputs worth keeping --------------------------------------------------------------------------------------

_BAR = re.compile(r"\d+%\||\d+(?:it|B|ex|examples) ?\[\d\d:\d\d|[\d.?]+ ?(?:k|M|G)?(?:it|s|B|examples)/(?:s|it)\b")
_WIDGET = "application/vnd.jupyter.widget-view+json"


def _last_version(line: str) -> str:
    "What is left on the screen of a line that was rewritten with carriage returns."
    return [part for part in line.split("\r") if part][-1] if line.strip("\r") else ""


def tidy_outputs(nb) -> None:
    """Drop, in place, what means nothing outside the session that made it.

    Progress bars, widget views without their kernel (their HTML or text stays), the number of this process, and
    the path of this checkout.
    """
    def tidy_text(text: str) -> str:
        text = re.sub(r"\S*/ipykernel_\d+/\d+\.py", "<cell>", text)
        return text.replace(f"{ROOT}{os.sep}", "").replace(str(ROOT), ".").replace(str(Path.home()) + os.sep, "~/")

    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        kept = []
        for out in cell.outputs:
            if out.output_type == "stream":
                lines = [_last_version(line) for line in out.text.split("\n")]
                if out.name == "stderr":
                    lines = [line for line in lines if not _BAR.search(line)]
                out.text = tidy_text("\n".join(lines))
                if not out.text.strip():
                    continue
            elif out.output_type in ("display_data", "execute_result"):
                was_widget = out.data.pop(_WIDGET, None)
                plain = out.data.get("text/plain", "")
                if was_widget and "text/html" not in out.data and (_BAR.search(plain) or not plain):
                    continue
                for kind, value in out.data.items():
                    if kind.startswith("text/"):
                        out.data[kind] = tidy_text(value)
            kept.append(out)
        cell.outputs = kept
    nb.metadata.pop("widgets", None)
