"""Render README.md, and the pictures it shows, from nbs/index.ipynb as it is: nothing is run.

Pictures go to nbs/images/. The same notebook always gives the same files.
"""
import base64
import re
import sys

import nbformat
from nbconvert import MarkdownExporter

from notebooks import NBS, ROOT, relink, visible

INDEX = NBS / "index.ipynb"
README = ROOT / "README.md"
IMAGES = NBS / "images"
PREFIX = "readme-"  # of the pictures that this script owns in nbs/images/


def link(path: str, anchor: str) -> str:
    "A link from the README's folder; GitHub would show a wrong one without a word, so it must lead somewhere."
    if not (ROOT / path).exists():
        raise SystemExit(f"nbs/index.ipynb links to {path}, which is not there")
    return path + anchor


def plain_table(page: str) -> str:
    "A pandas table without the style sheet and attributes that GitHub drops or shows as text."
    page = re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL)
    page = re.sub(r"</?div[^>]*>", "", page)
    return re.sub(r' (?:style|class|border)="[^"]*"', "", page).strip()


def choose(cell, output, images: dict) -> None:
    "Keep, in place, the one form of an output that GitHub shows as meant."
    data, alt = output.data, cell.metadata["alt"] or "Figure"
    page, plain = data.get("text/html", ""), data.get("text/plain", "")
    if "text/markdown" in data:
        text = relink(data["text/markdown"], link)
    elif "image/png" in data:
        name = f"{PREFIX}{cell.id}-{cell.outputs.index(output)}.png"
        images[name] = base64.b64decode(data["image/png"])
        text = f"![{alt}](nbs/images/{name})"
    elif 'class="dataframe"' in page:
        text = plain_table(page)
    elif page and not re.search(r"<(?:style|script|svg)|\sstyle=", page):
        text = page
    elif plain and not re.fullmatch(r"<[\w.]+ object.*>", plain.strip()):
        text = f"```text\n{plain}\n```"
    else:
        raise SystemExit(f"cell {cell.id} of nbs/index.ipynb shows only styled HTML, which GitHub strips: "
                         "give it a text/markdown, image/png or text/plain form too, or mark it `#| hide`")
    output.data = nbformat.from_dict({"text/markdown": text})


def render() -> tuple[str, dict[str, bytes]]:
    "The text of README.md, and the bytes of each picture by its name in nbs/images/."
    nb, images = visible(nbformat.read(INDEX, as_version=4)), {}
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, link)
        if cell.cell_type != "code":
            continue
        if not cell.metadata["echo"] or not cell.source:
            cell.metadata["transient"] = {"remove_source": True}
        cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.name == "stdout"]
        for output in cell.outputs:
            if output.output_type == "stream":
                output.update(output_type="display_data", metadata={},
                              data={"text/markdown": f"```text\n{output.text.rstrip()}\n```"})
                del output["name"], output["text"]
            else:
                choose(cell, output, images)
    text = MarkdownExporter().from_notebook_node(nb)[0]
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", images


def owned() -> dict[str, bytes]:
    "The pictures of the README that lie in nbs/images/ now."
    return {path.name: path.read_bytes() for path in sorted(IMAGES.glob(f"{PREFIX}*.png"))}


def main():
    if not INDEX.exists():
        sys.exit("nbs/index.ipynb is not there: README.md is made from it")
    text, images = render()
    README.write_text(text, encoding="utf-8")
    for name in owned().keys() - images.keys():
        (IMAGES / name).unlink()
    IMAGES.mkdir(exist_ok=True)
    for name, content in images.items():
        (IMAGES / name).write_bytes(content)
    print(f"README.md written, with {len(images)} pictures in nbs/images/")


if __name__ == "__main__":
    main()
