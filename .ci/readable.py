"""What a reader sees of a notebook: shared by the README, the pages and the documentation site."""
import copy
import posixpath
import re
from configparser import ConfigParser

from notebooks import ROOT

DIRECTIVE = re.compile(r"^#\s*\|\s*([\w-]+):?[ \t]*(.*)\n?", re.MULTILINE)
LINK = re.compile(r"""(\]\(\s*<?|(?:href|src)=["'])([^)\s"'>]+)""")
CODE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)[^\S\n]*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def repository() -> str:
    "Where the files of this repository are shown."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return f"{config['DEFAULT']['git_url']}/blob/{config['DEFAULT']['branch']}"


def title(nb) -> str:
    "The first heading of a notebook."
    text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    return found[1] if (found := re.search(r"^#+\s+(.+?)\s*$", text, re.MULTILINE)) else "untitled"


def relink(markdown: str, folder: str, target) -> str:
    """Replace each relative link by what `target(path, anchor)` gives; code and absolute addresses stay as they are.

    folder: where the notebook lies. It and the path are relative to the repository's root.
    """
    def one(match):
        lead, link = match.groups()
        if re.match(r"[a-zA-Z][\w+.-]*:|/|#", link):
            return match[0]
        path, mark, anchor = link.partition("#")
        return lead + target(posixpath.normpath(posixpath.join(folder, path)), mark + anchor)

    parts = CODE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(one, part) for i, part in enumerate(parts))


def visible(nb, folder: str, target):
    "A copy without hidden cells, hidden sources and directives, and with links as `relink` makes them."
    nb = copy.deepcopy(nb)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, folder, target)
        if cell.cell_type != "code":
            continue
        flags, cell.source = dict(DIRECTIVE.findall(cell.source)), DIRECTIVE.sub("", cell.source).strip("\n")
        cell.metadata.update(alt=flags.get("fig-alt", "Figure"), hidden="hide" in flags or not cell.source,
                             fold=flags.get("code-fold") == "true",
                             transient={"remove_source": flags.get("echo") == "false"})
        for output in cell.outputs:
            if "text/markdown" in output.get("data", {}):
                output.data["text/markdown"] = relink(output.data["text/markdown"], folder, target)
    nb.cells = [cell for cell in nb.cells if not cell.metadata.get("hidden")]
    nb.metadata["language_info"] = {"name": "python"}
    return nb
