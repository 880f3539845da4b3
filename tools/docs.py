"""The site of `make docs`: pages from the notebooks and the docstrings, built by Sphinx, then checked.

A page has the address of its notebook below nbs; of an artefact it shows what the full profile executed.
Sphinx reads copies in docs/_build/source. Their links lead to pages, to downloads or into the repository.
"""

import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from path import groups

from s5vh_nb.basics.checks import check
from s5vh_nb.basics.files import write_text
from s5vh_nb.cli.artefacts import PAPERS, read_artefact
from s5vh_nb.cli.execute import executed_path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
BUILD = ROOT / "docs" / "_build"
DOWNLOADS = (".csv", ".png", ".svg", ".webp")  # other files are shown in the repository
# code, or a link: its text in brackets and where it leads
LINK = re.compile(r"(`+).+?\1(?!`)|(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\(([^)\s]+)\)", re.DOTALL)
WORDS = 300  # letters of an alternative text, about


def executed(path: Path) -> Path:
    "What is shown of a notebook: of an artefact the copy that the full profile executed, if it did."
    copy = executed_path(read_artefact(path), "full") if path.parent.name in PAPERS else path
    return copy if copy.exists() else path


class Site:
    "The folder that Sphinx reads."

    def __init__(self, folder: Path):
        self.folder, self.groups = folder / "source", groups()
        self.html = folder / "html"
        notebooks = [path for _, paths in self.groups for path in paths]
        pages = {path: path.relative_to(NBS).as_posix() for path in notebooks}
        pages |= {executed(path): page for path, page in pages.items()}
        pages[ROOT / "README.md"] = "index.ipynb"
        self.pages = pages | {ROOT / "LOG.md": "log.md", ROOT / "docs" / "equations.md": "equations.md"}
        settings = ConfigParser()
        settings.read(ROOT / "settings.ini", encoding="utf-8")
        self.url, self.branch = settings["DEFAULT"]["git_url"], settings["DEFAULT"]["branch"]
        self.written, self.dead = set(), []

    def write(self, address: str, text: str):
        "Write a page; one that is as before stays untouched, so that Sphinx need not read it again."
        path = self.folder / address
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
        self.written.add(path)

    def target(self, link: str, origin: Path) -> str | None:
        "Where a link in the file `origin` leads on the site; None: nowhere."
        if re.match(r"[a-z]+:", link):
            return link
        if link.startswith("#"):  # JupyterLab and GitHub keep the capitals of a notebook's headings
            return link.lower()
        name = link.partition("#")[0]
        anchor = link.removeprefix(name)
        path = Path(os.path.normpath(origin.parent / unquote(name)))
        here = (self.folder / self.pages[origin]).parent
        if not path.exists() or not path.is_relative_to(ROOT):
            return None
        if path in self.pages:
            return os.path.relpath(self.folder / self.pages[path], here) + anchor.lower()
        inside = path.relative_to(ROOT)
        if path.suffix not in DOWNLOADS:
            kind = "tree" if path.is_dir() else "blob"
            return f"{self.url}/{kind}/{self.branch}/{inside.as_posix()}{anchor}"
        copied = self.folder / "files" / inside
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copied)
        self.written.add(copied)
        return os.path.relpath(copied, here)

    def relink(self, text: str, origin: Path, example: bool = False) -> str:
        "Markdown with the links of the site; in an example, what leads nowhere is no link."

        def moved(found):
            if found[1]:
                return found[0]
            target = self.target(found[3], origin)
            if target is None and not example:
                self.dead.append(f"{origin.relative_to(ROOT)}: {found[3]} leads nowhere")
            return f"{found[2]}({target})" if target else found[2].strip("![]")

        return LINK.sub(moved, text)

    def notebook(self, path: Path):
        "The page of a notebook: links of the site, folded settings, pictures in words."
        origin, library = executed(path), path.parent.parent.name == "lib"
        nb = nbformat.read(origin, as_version=4)
        nb.cells = [cell for cell in nb.cells if shown(cell)]
        heading = prose = ""
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                heading, prose = (
                    [heading, *re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)][-1],
                    cell.source,
                )
                cell.source = self.relink(cell.source, origin)
            elif cell.cell_type == "code":
                fold(cell)
                cell.metadata.setdefault("mystnb", {})["image"] = {
                    "alt": in_words(heading, prose, cell.source)
                }
                for output in cell.outputs:
                    if text := output.get("data", {}).get("text/markdown"):
                        output.data["text/markdown"] = self.relink(text, origin, example=library)
        return nb

    def assemble(self):
        "Write all pages; what was a page and is none any more goes."
        trees = {"About": [], "Notebooks": [], "Library": [], "API reference": []}
        for title, paths in self.groups[1:]:
            for path in paths:
                self.write(self.pages[path], nbformat.writes(self.notebook(path)))
            folder = paths[0].parent.relative_to(NBS).as_posix()
            if folder == "pages":
                trees["About"] += [self.pages[path] for path in paths]
                continue
            self.write(f"{folder}.md", self.contents(title, folder, paths))
            wing = folder.removeprefix("lib/")
            if wing == folder:
                trees["Notebooks"].append(f"{title} <{folder}.md>")
            else:
                trees["Library"].append(f"{wing} <{folder}.md>")
                self.reference(wing, [path.stem for path in paths])
                trees["API reference"].append(f"{wing} <api/{wing}.md>")
        for path in (ROOT / "docs" / "equations.md", ROOT / "LOG.md"):
            self.write(self.pages[path], self.relink(path.read_text(encoding="utf-8"), path))
            trees["About"].append(self.pages[path])
        index = self.notebook(self.groups[0][1][0])
        hidden = "\n\n".join(
            tree(pages, f":hidden:\n:caption: {caption}") for caption, pages in trees.items()
        )
        index.cells.append(nbformat.v4.new_markdown_cell(hidden, id="contents"))
        self.write("index.ipynb", nbformat.writes(index))
        for path in {path for path in self.folder.rglob("*") if path.is_file()} - self.written:
            path.unlink()
            (self.html / path.relative_to(self.folder)).with_suffix(".html").unlink(missing_ok=True)

    def contents(self, title: str, folder: str, paths: list) -> str:
        "The page that lists the notebooks of a folder with their summaries."
        names = [f"{Path(folder).name}/{path.name}" for path in paths]
        lines = [f"# {title}\n"]
        for name, path in zip(names, paths):
            first = nbformat.read(path, as_version=4).cells[0].source
            head, summary = (re.search(rf"^{mark} (.+)$", first, re.MULTILINE) for mark in "#>")
            check(head, str(path), "a heading in its first cell", first[:60])
            lines.append(f"- [{head[1]}]({name})" + (f": {summary[1]}" if summary else ""))
        return "\n".join([*lines, "", tree(names, ":hidden:")]) + "\n"

    def reference(self, wing: str, stems: list):
        "The pages of a wing's modules, from their docstrings."
        for stem in stems:
            module = f"{wing}.{stem[3:]}"
            lines = [
                f"# {module}\n",
                f"Written and tested in the notebook [](../../lib/{wing}/{stem}.ipynb).\n",
            ]
            lines += ["```{eval-rst}", f".. automodule:: s5vh_nb.{module}", "   :members:", "```\n"]
            self.write(f"api/{wing}/{stem[3:]}.md", "\n".join(lines))
        self.write(
            f"api/{wing}.md", f"# s5vh_nb.{wing}\n\n{tree([f'{wing}/{stem[3:]}' for stem in stems])}\n"
        )


def tree(pages: list, options: str = ":maxdepth: 1") -> str:
    "A table of contents in MyST."
    return "\n".join(["```{toctree}", options, "", *pages, "```"])


def tags(cell) -> set:
    return set(cell.metadata.get("tags", []))


def shown(cell) -> bool:
    "Not the links to neighbours, since each page has its own, and not the line that names the module."
    return "nav" not in tags(cell) and not cell.source.startswith("#| default_exp")


def fold(cell):
    "Fold a cell of settings or of imports that only tests need; say what a reader would unfold."
    settings = tags(cell) & {"parameters", "injected-parameters"}
    if settings or cell.source.startswith("#| hide"):
        cell.metadata["tags"] = sorted(tags(cell) | {"hide-input"})
    words = "the settings" if settings else "the code"
    cell.metadata["mystnb"] = {"code_prompt_show": f"Show {words}", "code_prompt_hide": f"Hide {words}"}


def in_words(heading: str, prose: str, code: str) -> str:
    "A picture for those who do not see it: its heading, what is said about it, and its axes."
    prose = re.sub(r"\$\$.*?\$\$|```.*?```", "", prose, flags=re.DOTALL)
    prose = " ".join(line for line in prose.splitlines() if not re.match(r"[#|>]", line))
    words = [re.sub(r"(?<!\?)$", ".", plain(heading))]
    for sentence in re.split(r"(?<=[.!?])\s+", prose.strip()):
        if len(" ".join([*words, sentence])) > WORDS:
            break
        if "\\" not in sentence:  # a formula is not read aloud
            words.append(plain(sentence))
    axes = [re.findall(rf"{axis}label(?:\(|=)f?[\"']([^\"'{{\\]+)", code) for axis in "xy"]
    if all(axes):
        words.append(f"{axes[1][0].strip()} over {axes[0][0].strip()}.")
    return " ".join(filter(None, words))


def plain(text: str) -> str:
    "Markdown as it is read aloud."
    return re.sub(r"[*`$]", "", LINK.sub(lambda found: (found[2] or found[0]).strip("![]"), text)).strip()


class Page(HTMLParser):
    "Addresses, ids, pictures and dollars of a built page."

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loads = set(), set()
        self.ids, self.silent = set(), []
        self.dollars, self.inside = [], []  # `inside`: open tags whose text is code or a formula
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        address = attrs.get("href") or attrs.get("src")
        if address:
            (self.links if tag == "a" else self.loads).add(address)
        if tag == "img" and not (attrs.get("alt") or "").strip():
            self.silent.append(address)
        if self.inside or tag in ("pre", "code", "script") or "math" in (attrs.get("class") or "").split():
            self.inside += [tag] * (tag not in ("br", "img", "input", "hr", "wbr", "link", "meta"))

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if "$" in data and not self.inside:
            self.dollars.append(data.strip()[:60])


def faults(html: Path) -> list:
    "Of built pages: dead links, what comes from another host, pictures without words, formulas as typed."
    pages = {path: Page(path) for path in sorted(html.rglob("*.html")) if "_static" not in path.parts}
    found = []
    for path, page in pages.items():
        told = [f"{link[:60]} is a picture without an alternative text" for link in page.silent]
        told += [f"{text!r} has a dollar: a formula that was not taken for one?" for text in page.dollars]
        for link in sorted(page.links | page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                told += [f"{link} is loaded from elsewhere"] * (link in page.loads and parts.scheme != "data")
                continue
            there = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            if not there.is_file():
                told.append(f"{link} leads nowhere")
            elif parts.fragment and there in pages and unquote(parts.fragment) not in pages[there].ids:
                told.append(f"{link} has no such anchor")
        found += [f"{path.relative_to(html)}: {text}" for text in told]
    return found


def build(folder: Path = BUILD) -> Path:
    "Assemble, build strictly and check; returns the folder of the pages."
    site = Site(folder)
    site.assemble()
    if site.dead:
        raise SystemExit("\n".join(["make docs: links of the sources", *site.dead]))
    words = ["-c", ROOT / "docs", "-d", folder / "doctrees", *"-b html -W --keep-going -n -q -j 2".split()]
    view = f"html_theme_options.source_view_link={site.url}/blob/{site.branch}/nbs/{{filename}}"
    command = [sys.executable, "-m", "sphinx", *words, "-D", view, site.folder, site.html]
    strict = False
    try:
        strict = subprocess.run(command).returncode == 0
    finally:
        if not strict:  # Sphinx warns of a page only when it reads it
            shutil.rmtree(folder / "doctrees", ignore_errors=True)
    if not strict:
        raise SystemExit("make docs: Sphinx warns, see above")
    if found := faults(site.html):
        raise SystemExit("\n".join(["make docs: the built pages", *found]))
    return site.html


if __name__ == "__main__":
    print(f"make docs: {build() / 'index.html'}")
