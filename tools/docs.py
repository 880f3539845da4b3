"""The site of `make docs`: pages from the notebooks and the docstrings, built by Sphinx, then checked.

A page's address is that of its notebook below nbs; artefact notebooks are shown as the full profile executed them.
Sphinx reads copies in docs/_build/source, whose links lead to pages, to downloads or to the repository.
"""

import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

from s5vh_nb.basics.checks import check
from s5vh_nb.basics.files import write_text
from s5vh_nb.cli.artefacts import PAPERS

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "docs" / "_build"
WINGS = ("basics", "datasets", "ops", "models", "learning", "search", "measure", "evidence", "cli")
DOWNLOADS = (".csv", ".png", ".svg", ".webp")  # other files are shown in the repository
TITLES = {
    "learn": "Learn",
    "s5vh": "S5VH",
    "dmmh": "DMMH",
    "beyond": "Beyond the papers",
    "data": "How the data sets were made",
}
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\(([^)\s]+)\)")


def reading_order() -> list:
    "The notebooks but the index, in the order in which they are read."
    folders = ["pages", "learn", *(f"lib/{wing}" for wing in WINGS), *PAPERS, "data"]
    return [path for folder in folders for path in sorted((ROOT / "nbs" / folder).glob("*.ipynb"))]


def addresses(notebooks: list) -> dict:
    "Where Sphinx finds the copy of each file that becomes a page."
    pages = {path: path.relative_to(ROOT / "nbs").as_posix() for path in [ROOT / "nbs/index.ipynb", *notebooks]}
    return pages | {
        ROOT / "README.md": "index.ipynb",
        ROOT / "LOG.md": "log.md",
        ROOT / "docs/equations.md": "equations.md",
    }


class Site:
    "The folder that Sphinx reads."

    def __init__(self, folder: Path, notebooks: list):
        self.folder, self.notebooks, self.pages = folder, notebooks, addresses(notebooks)
        settings = ConfigParser()
        settings.read(ROOT / "settings.ini", encoding="utf-8")
        self.repository = f"{settings['DEFAULT']['git_url']}/{{}}/{settings['DEFAULT']['branch']}/{{}}"
        self.written = set()

    def write(self, address: str, text: str):
        "Write a page; one that is as before stays untouched, so that Sphinx need not read it again."
        path = self.folder / address
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
        self.written.add(path)

    def target(self, link: str, origin: Path) -> str:
        "Where a link of the file `origin` leads on the site."
        if re.match(r"[a-z]+:|#", link):
            return link
        name, _, anchor = link.partition("#")
        path = Path(os.path.normpath(origin.parent / unquote(name)))
        where = f"{origin.relative_to(ROOT)}, link {link}"
        check(path.exists() and path.is_relative_to(ROOT), where, "a file of this project", "nothing")
        here = (self.folder / self.pages[origin]).parent
        anchor = anchor and f"#{anchor}"
        if path in self.pages:
            return os.path.relpath(self.folder / self.pages[path], here) + anchor
        inside = path.relative_to(ROOT).as_posix()
        if path.suffix not in DOWNLOADS:
            return self.repository.format("tree" if path.is_dir() else "blob", inside) + anchor
        copied = self.folder / "files" / inside
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copied)
        self.written.add(copied)
        return os.path.relpath(copied, here)

    def relink(self, text: str, origin: Path) -> str:
        "Markdown with the links of the site."
        return LINK.sub(lambda found: f"{found[1]}({self.target(found[2], origin)})", text)

    def notebook(self, path: Path):
        "The page of a notebook: links, folded settings, pictures in words; without its own links to neighbours."
        ran = ROOT / "results" / "full" / "executed" / f"{path.parent.name}_{path.name}"
        nb = nbformat.read(ran if ran.exists() else path, as_version=4)
        nb.cells = [cell for cell in nb.cells if "nav" not in cell.metadata.get("tags", [])]
        heading = prose = ""
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                heading = re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)[-1:] or [heading]
                heading, prose = heading[0], cell.source
                cell.source = self.relink(cell.source, path)
            elif cell.cell_type == "code":
                tags = set(cell.metadata.get("tags", []))
                if tags & {"parameters", "injected-parameters"}:
                    cell.metadata["tags"] = sorted(tags | {"hide-input"})
                cell.metadata["mystnb"] = {"image": {"alt": in_words(heading, prose, cell.source)}}
                for output in cell.outputs:
                    if "text/markdown" in output.get("data", {}):
                        output.data["text/markdown"] = self.relink(output.data["text/markdown"], path)
        return nb

    def assemble(self):
        "Write everything; a page that was, and is no more, goes."
        groups = [(folder, list(paths)) for folder, paths in groupby(self.notebooks, lambda path: path.parent)]
        listed = []
        for folder, paths in groups:
            for path in paths:
                self.write(self.pages[path], nbformat.writes(self.notebook(path)))
            name = folder.relative_to(ROOT / "nbs").as_posix()
            if name != "pages":
                self.write(f"{name}.md", self.contents(name, paths))
            listed.append(name)
        for name in ("LOG.md", "docs/equations.md"):
            path = ROOT / name
            self.write(self.pages[path], self.relink(path.read_text(encoding="utf-8"), path))
        wings = [name.removeprefix("lib/") for name in listed if name.startswith("lib/")]
        for wing in wings:
            self.reference(wing)
        trees = {
            "About": [self.pages[path] for path in self.notebooks if path.parent.name == "pages"]
            + ["equations.md", "log.md"],
            "Notebooks": [f"{name}.md" for name in listed if name in TITLES],
            "Library": [f"lib/{wing}.md" for wing in wings],
            "API reference": [f"api/{wing}.rst" for wing in wings],
        }
        index = self.notebook(ROOT / "nbs/index.ipynb")
        trees = "\n\n".join(tree(pages, caption=title) for title, pages in trees.items())
        index.cells.append(nbformat.v4.new_markdown_cell(trees, id="contents"))
        self.write("index.ipynb", nbformat.writes(index))
        for path in set(self.folder.rglob("*")) - self.written:
            if path.is_file():
                path.unlink()

    def contents(self, name: str, paths: list) -> str:
        "The page that lists the notebooks of a folder."
        title = TITLES.get(name) or f"The wing `{name.removeprefix('lib/')}`"
        base, lines = f"{Path(name).parent}/", []
        for path in paths:
            first = nbformat.read(path, as_version=4).cells[0].source
            summary = re.search(r"^> (.+)$", first, re.MULTILINE)
            head = re.search(r"^# (.+)$", first, re.MULTILINE)[1]
            link = f"- [{head}]({self.pages[path].removeprefix(base)})"
            lines.append(f"{link}: {summary[1]}" if summary else link)
        pages = [self.pages[path].removeprefix(base) for path in paths]
        return f"# {title}\n\n" + "\n".join(lines) + "\n\n" + tree(pages) + "\n"

    def reference(self, wing: str):
        "The pages of a wing's modules, from their docstrings."
        names = [path.stem[3:] for path in self.notebooks if path.parent == ROOT / "nbs/lib" / wing]
        for path in self.notebooks:
            if path.parent != ROOT / "nbs/lib" / wing:
                continue
            module = f"s5vh_nb.{wing}.{path.stem[3:]}"
            lines = [module, "=" * len(module), "", f"Written and tested in :doc:`/lib/{wing}/{path.stem}`.", ""]
            lines += [f".. automodule:: {module}", "   :members:", ""]
            self.write(f"api/{wing}/{path.stem[3:]}.rst", "\n".join(lines))
        title = f"s5vh_nb.{wing}"
        lines = [title, "=" * len(title), "", ".. toctree::", "   :maxdepth: 1", "", *(f"   {wing}/{name}" for name in names)]
        self.write(f"api/{wing}.rst", "\n".join([*lines, ""]))


def tree(pages: list, **options) -> str:
    "A hidden table of contents, which the sidebar shows."
    options = "".join(f":{name}: {value}\n" for name, value in options.items())
    return "```{toctree}\n:hidden:\n" + options + "\n" + "\n".join(pages) + "\n```"


def in_words(heading: str, prose: str, code: str) -> str:
    "A picture for those who do not see it: its heading, what is said about it, and its axes."
    prose = " ".join(line for line in prose.splitlines() if not re.match(r"#|\||\$\$|```|> ?$|$", line))
    prose = re.split(r"(?<=[.!?:])\s", re.sub(r"^> ", "", plain(prose)))
    axes = [re.findall(rf"{axis}label\(?=?\s*f?[\"']([^\"'{{]+)", code)[:1] for axis in "xy"]
    words = [f"{plain(heading)}.", *prose[:2]]
    if all(axes):
        words.append(f"{axes[1][0].strip()} over {axes[0][0].strip()}.")
    return " ".join(filter(None, words))


def plain(text: str) -> str:
    "Markdown as it is read aloud."
    return re.sub(r"[*`$\\]", "", LINK.sub(lambda found: found[1].strip("![]"), text)).strip()


class Links(HTMLParser):
    "Addresses, ids and pictures of one page."

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.ids, self.loads, self.silent = set(), set(), set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        if tag == "a" and attrs.get("href"):
            self.links.add(attrs["href"])
        elif tag in ("img", "script", "iframe", "source", "video", "audio") and attrs.get("src"):
            self.loads.add(attrs["src"])
        elif tag == "link" and attrs.get("rel") not in ("canonical",) and attrs.get("href"):
            self.loads.add(attrs["href"])
        if tag == "img" and not (attrs.get("alt") or "").strip():
            self.silent.append(attrs.get("src", "")[:60])


def faults(html: Path) -> list:
    "What is wrong with built pages: links and anchors that lead nowhere, foreign hosts, pictures without words."
    pages = {path: Links(path) for path in sorted(html.rglob("*.html")) if "_static" not in path.parts}
    found = []
    for path, page in pages.items():
        where = path.relative_to(html).as_posix()
        found += [f"{where}: picture {src} has no alternative text" for src in page.silent]
        for link in sorted(page.links | page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads and parts.scheme != "data":
                    found.append(f"{where}: loads {link} from another host")
                continue
            target = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            if not target.is_file():
                found.append(f"{where}: {link} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                found.append(f"{where}: {link} has no such anchor")
    return found


def build(folder: Path = BUILD, notebooks: list | None = None) -> Path:
    "Assemble, build strictly and check; returns the folder of the pages."
    site = Site(folder / "source", notebooks or reading_order())
    site.assemble()
    words = "-b html -W --keep-going -n -q -j 2".split()
    paths = ["-c", ROOT / "docs", "-d", folder / "doctrees", folder / "source", folder / "html"]
    subprocess.run([sys.executable, "-m", "sphinx", *words, *paths], check=True)
    found = faults(folder / "html")
    check(not found, "the site", "links that lead somewhere and pictures in words", "\n".join(["", *found]))
    return folder / "html"


if __name__ == "__main__":
    print(f"make docs: {build() / 'index.html'}")
