"""Notebooks as static pages in _site/ that ask no other host for anything. Nothing is run.

Formulas become MathML, styles and pictures are inside, links lead to the other pages or to the repository. Outputs are
those of the last `make series` where it ran the same code, else those in nbs/.
"""
import html
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from notebooks import NBS, ROOT, all_notebooks, with_outputs
from readable import repository, title, visible

SITE = ROOT / "_site"
LIMIT = 5_000_000  # bytes of a page


class Renderer(IPythonRenderer):
    "Markdown with its pictures inside, and with formulas as MathML, which browsers draw by themselves."

    def block_math(self, body: str) -> str:
        return convert(body.strip(), display="block")

    def inline_math(self, body: str) -> str:
        return convert(body.strip())

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")


def rendered(markdown: str) -> str:
    return MarkdownWithMath(renderer=Renderer(escape=False, embed_images=True, path=str(NBS))).render(markdown)


def build(books: dict, site: Path) -> None:
    "Write the pages of some notebooks, such as `appendix/explorer` -> notebook."
    logging.getLogger("traitlets").setLevel(logging.ERROR)
    exporter = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True, template_file="page.html.j2",
                            extra_template_paths=[str(Path(__file__).parent)])
    exporter.register_filter("markdown2html", rendered)
    exporter.register_filter("clean_html", lambda page: page)  # sanitizing is for notebooks of others, and slow
    names, titles, base = list(books), {name: title(nb) for name, nb in books.items()}, repository()
    for before, name, after in zip([None, *names], names, [*names[1:], None]):
        up = "../" * name.count("/")

        def target(path: str, anchor: str) -> str:
            inside = path.removeprefix("nbs/")
            if inside.removesuffix(".ipynb") in books:
                return f"{up}{inside.removesuffix('.ipynb')}.html{anchor}"
            return inside if inside.startswith("images/") else f"{base}/{path}{anchor}"

        nb = visible(books[name], f"nbs/{name}".rpartition("/")[0], target)
        for cell in nb.cells:
            for data in (output.data for output in cell.get("outputs", []) if "data" in output):
                for kind in {"image/png", "image/gif"} & data.keys():  # with the text that describes it
                    alt = html.escape(cell.metadata.alt)
                    data["text/html"] = f'<img alt="{alt}" src="data:{kind};base64,{data[kind]}">'
        resources = dict(metadata={"name": titles[name]}, up=up, titles=titles, before=before, after=after)
        file = site / f"{name}.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(exporter.from_notebook_node(nb, resources)[0], encoding="utf-8")


def problems(site: Path) -> list[str]:
    "What is wrong with the pages of a folder: what they load from elsewhere, links that lead nowhere, their size."
    found, pages = [], {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    ids = {path: set(re.findall(r'\sid="([^"]*)"', text)) for path, text in pages.items()}
    for path, text in pages.items():
        name, size = path.relative_to(site), path.stat().st_size
        if size > LIMIT:
            found.append(f"{name} has {size:,} bytes, the limit is {LIMIT:,}")
        tags = re.findall(r"<(?:script|img|link|iframe|source|video|audio|object|embed|image|use)\b[^>]*>", text)
        styles = re.findall(r"<style.*?</style>|\sstyle=\"[^\"]*\"", text, re.DOTALL)
        loads = [url for tag in tags for url in re.findall(r'\s(?:src|href|srcset|data)="([^"]*)"', tag)]
        loads += [url for style in styles for url in re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')]+)", style)]
        found += [f"{name} loads {url[:80]}" for url in loads if not re.match(r"data:|#", url)]
        for url in re.findall(r'<a\s[^>]*?href="([^"]*)"', text):
            file, _, anchor = unquote(html.unescape(url)).partition("#")
            there = Path(os.path.normpath(path.parent / file)) if file else path
            if not re.match(r"[a-zA-Z][\w+.-]*:", url) and (there not in pages or anchor and anchor not in ids[there]):
                found.append(f"{name} links to {url}, which is not there")
    return found


def read_books() -> dict:
    "All notebooks but the checks, by name."
    paths = [path for path in all_notebooks() if path.parent.name != "checks"]
    return {path.relative_to(NBS).with_suffix("").as_posix(): with_outputs(path)[0] for path in paths}


if __name__ == "__main__":
    shutil.rmtree(SITE, ignore_errors=True)
    build(read_books(), SITE)
    if wrong := problems(SITE):
        sys.exit("\n".join(wrong))
    print("the pages are in _site/; begin with _site/index.html")
