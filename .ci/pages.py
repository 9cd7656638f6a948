"""Notebooks as static pages that ask no other host for anything.

    make html      the executed notebooks of the last `make series`, or those in nbs/ as they are, into _site/

Formulas become MathML, styles are inside, links lead to the other pages or to the repository. Nothing is run.
"""
import html
import logging
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
from jinja2 import DictLoader
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from docs import repository
from notebooks import NBS, ROOT, relink, series_notebooks, title, visible

SITE, EXECUTED = ROOT / "_site", ROOT / "_series"
LIMIT = 5_000_000  # bytes of a page

STYLE = """
:root { color-scheme: light dark }
main { max-width: 60rem; margin: 0 auto; padding: 0 .5rem }
nav.pages { display: flex; justify-content: space-between; gap: 1rem; font: 14px system-ui, sans-serif; padding: .8rem .4rem }
nav.pages a { color: var(--jp-content-link-color, LinkText) }
:focus-visible { outline: 2px solid #3d85d8; outline-offset: 2px }
math { font-size: 1.08em } math[display=block] { margin: .8em 0; overflow-x: auto }
.jp-RenderedHTMLCommon { overflow-x: auto } img { max-width: 100% }
@media (prefers-color-scheme: dark) { .jp-RenderedImage img { background: white; border-radius: 3px } }
"""

# The lab template without what it fetches: require.js, MathJax, Mermaid and the widget manager.
TEMPLATE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block html_head_css %}<style>{{ resources.page_style }}</style>{% endblock %}
{% block body_header %}{{ super() }}{{ resources.page_nav }}{% endblock %}
{% block body_footer %}{{ resources.page_nav }}{{ super() }}{% endblock %}
"""


class Renderer(IPythonRenderer):
    "Markdown whose formulas are MathML, which browsers draw by themselves."

    def block_math(self, body: str) -> str:
        return convert(body.strip(), display="block")

    def inline_math(self, body: str) -> str:
        return convert(body.strip())

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")


class PageExporter(HTMLExporter):
    "A notebook as one file, in the light or dark colours that the reader's system asks for."

    def __init__(self, **settings):
        super().__init__(exclude_input_prompt=True, exclude_output_prompt=True, embed_images=True,
                         extra_loaders=[DictLoader({"page.html.j2": TEMPLATE})], template_file="page.html.j2", **settings)
        self.register_filter("markdown2html", self.formulas)

    @staticmethod
    def formulas(source: str) -> str:
        return MarkdownWithMath(renderer=Renderer(escape=False, anchor_link_text="¶")).render(source)

    def style(self) -> str:
        dark = next(path for folder in self.template_paths if (path := Path(folder) / "static" / "theme-dark.css").exists())
        return f"{STYLE}\n@media (prefers-color-scheme: dark) {{\n{dark.read_text(encoding='utf-8')}\n}}"


def page_name(name: str) -> str:
    "The page of a notebook. index.html is the list of pages, so that index.ipynb becomes overview.html."
    return ("overview" if name == "index" else name) + ".html"


def navigation(name: str, pages: list[str]) -> str:
    "Links to the page before, the list, and the page after."
    at = pages.index(name)
    before, after = (pages[i] if 0 <= i < len(pages) else None for i in (at - 1, at + 1))
    link = lambda other, text: f'<a href="{page_name(other)}">{text}</a>' if other else "<span></span>"
    return (f'<nav class="pages" aria-label="pages">{link(before, f"← {before}")}<a href="index.html">all notebooks</a>'
            f'{link(after, f"{after} →")}</nav>')


def page(nb, name: str, pages: list[str], outside: str) -> str:
    "The HTML page of an executed notebook. Links lead to the other pages, or to files below `outside`."
    def target(path: str, anchor: str) -> str:
        linked = Path(path).stem
        return (page_name(linked) if path == f"nbs/{linked}.ipynb" and linked in pages else f"{outside}/{path}") + anchor

    nb = visible(nb)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, target)
        else:
            cell.metadata["transient"] = {"remove_source": not cell.metadata["echo"]}
    logging.getLogger("traitlets").setLevel(logging.ERROR)
    exporter = PageExporter()
    resources = {"metadata": {"name": title(nb)}, "page_style": exporter.style(), "page_nav": navigation(name, pages)}
    return exporter.from_notebook_node(nb, resources)[0]


# --- checks -----------------------------------------------------------------------------------------------------

class Inventory(HTMLParser):
    "What a page has and wants: ids, links, and addresses that a browser would load by itself."
    LOADS = {("script", "src"), ("img", "src"), ("img", "srcset"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("video", "src"),
             ("audio", "src"), ("object", "data"), ("embed", "src"), ("image", "href"), ("use", "href")}

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.loads, self.style = set(), [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.style = tag == "style"
        for name, value in attrs:
            if name == "id":
                self.ids.add(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value or "")
            elif (tag, name) in self.LOADS:
                self.loads.append(value or "")
            elif name == "style":
                self.loads += re.findall(r"url\(\s*[\"']?([^\"')]+)", value or "")

    def handle_data(self, data):
        if self.style:
            self.loads += re.findall(r"url\(\s*[\"']?([^\"')]+)", data) + re.findall(r"@import\s+[\"']([^\"']+)", data)

    def handle_endtag(self, tag):
        self.style = False


def problems(folder: Path) -> list[str]:
    "What is wrong with the pages of a folder: what they load from elsewhere, links that lead nowhere, their size."
    found, pages = [], {path.name: Inventory(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.html"))}
    for name, has in pages.items():
        if (size := (folder / name).stat().st_size) >= LIMIT:
            found.append(f"{name} has {size:,} bytes, the limit is {LIMIT:,}")
        found += [f"{name} loads {address[:80]}" for address in has.loads if not re.match(r"data:|#", address)]
        for link in has.links:
            if re.match(r"[a-zA-Z][\w+.-]*:", link):
                continue
            path, _, anchor = link.partition("#")
            there = pages.get(unquote(path) or name)
            if there is None or anchor and unquote(anchor) not in there.ids:
                found.append(f"{name} links to {link}, which is not there")
    return found


# --- the folder -------------------------------------------------------------------------------------------------

INDEX = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2.5rem auto; padding: 0 1rem }}
ol {{ list-style: none; padding: 0 }} li {{ padding: .7rem 0; border-top: 1px solid #8884 }}
a {{ font-weight: 600; color: #0a50a8 }} @media (prefers-color-scheme: dark) {{ a {{ color: #64b5f6 }} }} small {{ opacity: .65; margin-left: .5em }} p {{ margin: .1rem 0 }} .made {{ opacity: .65 }}
:focus-visible {{ outline: 2px solid #3d85d8; outline-offset: 2px }}
</style></head>
<body><main><h1>{title}</h1><p class="made">{made}</p>
<ol>
{rows}
</ol></main></body></html>
"""


def question(nb) -> str:
    "What a notebook asks: the quotation below its title."
    for cell in nb.cells:
        if cell.cell_type == "markdown" and (found := re.search(r"^> (.+)$", cell.source, re.MULTILINE)):
            return found[1].strip()
    return ""


def build(books: dict, site: Path, made: str) -> None:
    "Write the pages of some notebooks, name -> notebook, and the list of them with a word on where they come from."
    site.mkdir()
    for name, nb in books.items():
        (site / page_name(name)).write_text(page(nb, name, list(books), repository()), encoding="utf-8")
    rows = "\n".join(f'<li><a href="{page_name(name)}">{"Overview" if name == "index" else html.escape(title(nb))}</a><small>{name}</small>'
                     f'<p>{html.escape(question(nb))}</p></li>' for name, nb in books.items())
    (site / "index.html").write_text(INDEX.format(title=html.escape(title(books["index"])), made=made, rows=rows), encoding="utf-8")


def read_series(folder: Path) -> dict:
    "The notebooks of the series in a folder by their names, the index first."
    names = [path.stem for path in series_notebooks()]
    return {name: nbformat.read(folder / f"{name}.ipynb", as_version=4) for name in [names[-1], *names[:-1]]}


def main():
    executed = all((EXECUTED / path.name).exists() for path in series_notebooks())
    source, made = (EXECUTED, "The notebooks of the last run.") if executed else (NBS, "The notebooks as they are in the repository.")
    shutil.rmtree(SITE, ignore_errors=True)
    books = read_series(source)
    build(books, SITE, made)
    if wrong := problems(SITE):
        sys.exit("\n".join(wrong))
    print(f"{len(books)} pages and their index are in {SITE.name}/index.html, from {source.name}/")


if __name__ == "__main__":
    main()
