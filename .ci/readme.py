"""Render README.md, and the pictures it shows, from nbs/index.ipynb as it is: nothing is run.

Pictures go to nbs/images/. The same notebook always gives the same files.
"""
import base64
import re

import nbformat
from nbconvert import MarkdownExporter

from notebooks import NBS, ROOT
from readable import visible

README, IMAGES = ROOT / "README.md", NBS / "images"
PICTURES = {"image/gif": "gif", "image/png": "png", "image/svg+xml": "svg"}


def link(path: str, anchor: str) -> str:
    "A link from the README's folder; GitHub would show a wrong one without a word, so it must lead somewhere."
    if not (ROOT / path).exists():
        raise SystemExit(f"nbs/index.ipynb links to {path}, which is not there")
    return path + anchor


def markdown(cell, i: int, images: dict[str, bytes]) -> str:
    "An output in the one form that GitHub shows as meant; a picture is added to `images`."
    output = cell.outputs[i]
    data = output.get("data", {})
    text = output.get("text", data.get("text/plain", "")).rstrip()
    if "text/markdown" in data:
        return data["text/markdown"]
    for kind in [kind for kind in PICTURES if kind in data][:1]:
        name = f"readme-{cell.id}-{i}.{PICTURES[kind]}"
        images[name] = data[kind].encode() if kind == "image/svg+xml" else base64.b64decode(data[kind])
        return f"![{cell.metadata.alt}](nbs/images/{name})"
    if re.fullmatch(r"<[\w.]+ object.*>|", text):
        raise SystemExit(f"cell {cell.id} of nbs/index.ipynb shows only HTML, which GitHub strips of its style: "
                         "give it a form as Markdown, picture or text too, or mark it `#| hide`")
    return f"```text\n{text}\n```"


def render() -> tuple[str, dict[str, bytes]]:
    "The text of README.md, and the bytes of each picture by its name in nbs/images/."
    nb, images = visible(nbformat.read(NBS / "index.ipynb", 4), "nbs", link), {}
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [nbformat.v4.new_output("display_data", {"text/markdown": markdown(cell, i, images)})
                            for i, output in enumerate(cell.outputs) if output.get("name") != "stderr"]
    text = MarkdownExporter().from_notebook_node(nb)[0]
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", images


def pictures() -> dict[str, bytes]:
    "The pictures of the README that lie in nbs/images/ now."
    return {path.name: path.read_bytes() for path in IMAGES.glob("readme-*")}


if __name__ == "__main__":
    text, images = render()
    README.write_text(text, encoding="utf-8")
    IMAGES.mkdir(exist_ok=True)
    for name in pictures().keys() - images.keys():
        (IMAGES / name).unlink()
    for name, content in images.items():
        (IMAGES / name).write_bytes(content)
    print(f"README.md written, with {len(images)} pictures in nbs/images/")
