"""The site: links and anchors, pictures in words, and its pages in a browser, on a phone and on a desktop.

The site is built once, in docs/_build, which costs a minute on two free cores; what has not changed since the
last build is not read again. The strict build, which a warning ends, is a test by itself.
"""

import functools
import http.server
import importlib
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import nbformat
import pytest

from s5vh_nb.basics.files import find_root

pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
ROOT = find_root()
WIDTHS = {"phone": 390, "desktop": 1280}
SAMPLE = ("index", "lib/learning/02_losses", "s5vh/retrieval", "learn/02_selective_scan", "api/models/s5vh")
SAMPLE += ("equations", "genindex")


@pytest.fixture(scope="module")
def docs():
    "The script that makes the site."
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("docs")
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def site(docs):
    "The folder of the built pages."
    done = subprocess.run([sys.executable, ROOT / "tools" / "docs.py"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return docs.BUILD / "html"


# What it is made of


def test_every_notebook_and_module_has_a_page(site, docs):
    notebooks = [path for _, paths in docs.groups() for path in paths]
    assert len(notebooks) > 100
    pages = [path.relative_to(ROOT / "nbs").with_suffix(".html") for path in notebooks]
    wings = {path.parent.name for path in notebooks if path.parent.parent.name == "lib"}
    modules = [path for wing in wings for path in (ROOT / "s5vh_nb" / wing).glob("[!_]*.py")]
    pages += [Path("api") / path.relative_to(ROOT / "s5vh_nb").with_suffix(".html") for path in modules]
    assert not [str(page) for page in pages if not (site / page).is_file()]
    assert 'id="s5vh_nb.learning.losses.contrastive_loss"' in (site / "api/learning/losses.html").read_text(
        "utf-8"
    )


def test_front_page_is_light(site, docs):
    "Less than 1 MB without its pictures, and no formula that would load MathJax."
    page = docs.Page(site / "index.html")
    files = {"index.html", *(urlsplit(link).path for link in page.loads)}
    sizes = {name: (site / name).stat().st_size for name in files if name.endswith((".html", ".js", ".css"))}
    assert len(sizes) > 5 and sum(sizes.values()) < 1e6, sizes


def test_artefacts_are_shown_executed(site, docs):
    "Where the full profile has executed them; what sets them up is folded."
    ran = [path for _, paths in docs.groups() for path in paths if docs.executed(path) != path]
    assert ran
    for path in ran:
        text = (site / path.relative_to(ROOT / "nbs").with_suffix(".html")).read_text(encoding="utf-8")
        assert "cell_output" in text and "Show the settings" in text, path


# Links and words


def test_links_of_the_site(docs, tmp_path):
    made, origin = docs.Site(tmp_path), ROOT / "nbs" / "lib" / "models" / "04_s5vh.ipynb"
    for link, wanted in {
        "https://arxiv.org/abs/2412.14518": "https://arxiv.org/abs/2412.14518",
        "#shapes": "#shapes",
        "#The-layer": "#the-layer",
        "01_mamba.ipynb#The-layer": "01_mamba.ipynb#the-layer",
        "../../s5vh/retrieval.ipynb": "../../s5vh/retrieval.ipynb",
        "../../../README.md": "../../index.ipynb",
        "../../../LOG.md": "../../log.md",
        "../../../docs/equations.md": "../../equations.md",
        "../../../results/full/executed/s5vh_retrieval.ipynb": "../../s5vh/retrieval.ipynb",
        "../../../s5vh_nb/models/s5vh.py#L5": f"{made.url}/blob/main/s5vh_nb/models/s5vh.py#L5",
        "../../../tests": f"{made.url}/tree/main/tests",
    }.items():
        assert made.target(link, origin) == wanted
    text = "`[a](b)` [`a` [b]](../../../figures/drawings/s5vh.svg) ![c](../../../figures/drawings/dmmh.svg)"
    there = "../../files/figures/drawings"
    assert made.relink(text, origin) == f"`[a](b)` [`a` [b]]({there}/s5vh.svg) ![c]({there}/dmmh.svg)"
    assert (made.folder / "files/figures/drawings/dmmh.svg").is_file()
    assert made.relink("see [a](gone.csv)", origin, example=True) == "see a" and not made.dead
    made.relink("[a](gone.ipynb) and [b](../../../../outside.md)", origin)
    ends = [": gone.ipynb leads nowhere", ": ../../../../outside.md leads nowhere"]
    assert made.dead == [f"nbs/lib/models/04_s5vh.ipynb{end}" for end in ends]


def test_faults_are_found(docs, tmp_path):
    (tmp_path / "b.html").write_text(
        '<h1 id="here">b</h1><img src="data:image/png;base64," alt="a b">', "utf-8"
    )
    assert docs.faults(tmp_path) == []
    links = "".join(
        f'<a href="{link}">x</a>' for link in ("b.html#here", "#gone", "b.html#gone", "c.html", "mailto:a@b")
    )
    (tmp_path / "d.html").write_text("<p>a $b $<code>$c</code></p><span class='math'>$d</span>", "utf-8")
    loads = '<script src="https://example.org/a.js"></script><img src="b.html" alt=" ">'
    (tmp_path / "a.html").write_text(links + loads, encoding="utf-8")
    assert docs.faults(tmp_path) == [
        "a.html: b.html is a picture without an alternative text",
        "a.html: #gone has no such anchor",
        "a.html: b.html#gone has no such anchor",
        "a.html: c.html leads nowhere",
        "a.html: https://example.org/a.js is loaded from elsewhere",
        "d.html: 'a $b $' has a dollar: a formula that was not taken for one?",
    ]


def test_pictures_in_words(docs):
    "From what stands above them, at most as much as one listens to."
    said = "## Speed\n> short\n\nThe *scan* of [Mamba](a.ipynb) with `t` steps, $O(t)$."
    said += " Less is better. It is $\\Theta(t)$.\n| a |\n$$\nx = 1.\n$$\n"
    code = 'ax.set(xlabel="frames", ylabel="time (ms)")'
    words = "Speed. The scan of Mamba with t steps, O(t). Less is better. time (ms) over frames."
    assert docs.in_words("Speed", said, code) == words
    assert docs.in_words("Speed", "", "") == "Speed." and docs.in_words("Fast?", "", "") == "Fast?"
    assert len(docs.in_words("Speed", "Many words. " * 99, "")) <= docs.WORDS


def test_what_a_page_leaves_out_and_folds(docs):
    new = nbformat.v4.new_code_cell
    assert not docs.shown(new(metadata={"tags": ["nav"]})) and not docs.shown(
        new("#| default_exp models.s5vh")
    )
    for cell, words in (
        (new("bits = 64", metadata={"tags": ["parameters"]}), "Show the settings"),
        (new("#| hide\nimport os"), "Show the code"),
    ):
        docs.fold(cell)
        assert (
            cell.metadata["tags"][0] == "hide-input" and cell.metadata["mystnb"]["code_prompt_show"] == words
        )


# In a browser


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(site):
    "Of the site on this machine, while it is served."
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def view(browser, address):
    "A function that opens a page in a window of a width, and waits for its formulas."

    def open(name, width, scheme="light"):
        browser.said.clear()
        browser.look(width, scheme)
        browser.open(f"{address}/{name}.html")
        browser.js("window.MathJax && MathJax.startup.promise.then(() => true)")
        return browser

    return open


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("name", SAMPLE)
def test_a_page_fits_and_its_formulas_are_set(view, site, address, name, width):
    "Nothing sticks out, nothing comes from elsewhere, and nothing is missing."
    page = view(name, width)
    parts = "[document.documentElement, document.querySelector('.content')]"
    assert page.js(f"{parts}.every(part => part.scrollWidth <= part.clientWidth)")
    formulas = (site / f"{name}.html").read_text(encoding="utf-8").count("notranslate nohighlight")
    assert page.js("document.querySelectorAll('mjx-container').length") == formulas
    assert page.js("document.querySelectorAll('mjx-merror, [data-mjx-error]').length") == 0
    prose = page.js("[...document.querySelectorAll('article p')].map(p => p.innerText).join(' ')")
    assert not re.search(r"\\[(\[]", prose), "a formula that MathJax did not see"
    loaded = page.js("performance.getEntriesByType('resource').map(each => each.name)")
    assert loaded and all(each.startswith(address) for each in loaded) and not page.said
    assert formulas > 20 or "losses" not in name


ACTIVE = """(() => {
    const on = document.activeElement, style = getComputedStyle(on), box = on.getBoundingClientRect();
    const label = document.querySelector(`label[for="${on.id}"]:not(.overlay)`);
    const ring = getComputedStyle(label && on.type == "checkbox" ? label : on);
    return {name: on.getAttribute("aria-label") || on.name || on.innerText.trim(),
            href: on.getAttribute("href"),
            seen: ring.outlineStyle != "none" && parseFloat(ring.outlineWidth) >= 1,
            inside: box.right > 0 && box.left < innerWidth && style.visibility == "visible"};
})()"""


def tab(page, until, most=30):
    "Press Tab until a test holds; every stop shows that it has the focus."
    for _ in range(most):
        page.press("Tab", 9)
        stop = SimpleNamespace(**page.js(ACTIVE))
        assert stop.seen and stop.inside, stop
        if until(stop):
            return
    raise AssertionError(f"not reached in {most} steps, the last is {stop}")


def test_the_keyboard_goes_to_the_text_and_to_the_search(view):
    page = view("index", WIDTHS["desktop"])
    tab(page, lambda stop: stop.href == "#furo-main-content", most=2)
    tab(page, lambda stop: stop.name == "Search", most=5)
    tab(page, lambda stop: stop.href == "learn.html", most=20)


def test_the_keyboard_opens_the_sidebar_of_a_phone(view):
    page = view("index", WIDTHS["phone"])
    tab(page, lambda stop: stop.name == "Toggle site navigation sidebar", most=2)
    page.press(" ", 32)
    page.js("Promise.all(document.getAnimations().map(each => each.finished)).then(() => true)")
    tab(page, lambda stop: stop.name == "Search", most=8)


CONTRAST = """(() => {
    const parse = text => {
        const n = text.match(/[\\d.]+/g).map(Number), scale = text.startsWith("color(srgb") ? 255 : 1;
        return [n[0] * scale, n[1] * scale, n[2] * scale, n[3] ?? 1];
    };
    const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]).concat(1);
    const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
    const ground = el => el ? over(parse(getComputedStyle(el).backgroundColor), ground(el.parentElement))
                            : [255, 255, 255, 1];
    const found = {};
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    let count = 0;
    while (walker.nextNode()) {
        const el = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
        if (!text || !el.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue;
        if (el.closest("svg, mjx-assistive-mml, script, style")) continue;
        const style = getComputedStyle(el), size = parseFloat(style.fontSize);
        let faint = 1;
        for (let up = el; up; up = up.parentElement) faint *= parseFloat(getComputedStyle(up).opacity);
        const colour = parse(style.color), below = ground(el);
        colour[3] *= faint;
        const both = [light(over(colour, below)), light(below)].sort((a, b) => b - a);
        const ratio = (both[0] + 0.05) / (both[1] + 0.05);
        const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
        count += 1;
        if (ratio < (large ? 3 : 4.5))
            found[`${el.tagName}.${el.className} in ${el.parentElement.className}`] =
                `${ratio.toFixed(2)}: ${text.slice(0, 30)}`;
    }
    return [count, found];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", SAMPLE[:5])
def test_text_stands_out_from_its_ground(view, name, scheme):
    "Contrast of all text, WCAG 2.2 AA: 4.5 to 1, and 3 to 1 for large letters."
    page = view(name, WIDTHS["desktop"], scheme)
    page.js("for (const folded of document.querySelectorAll('details')) folded.open = true")
    count, faint = page.js(CONTRAST)
    assert count > 100 and not faint, faint
    page.js("document.querySelector('article p').style.color = 'rgb(128 128 128 / 0.9)'")
    assert len(page.js(CONTRAST)[1]) >= 1, "the test sees no grey"


def test_the_search_finds(view):
    page = view("search", WIDTHS["desktop"])
    page.loading("Page.navigate", url=page.js("location.href") + "?q=debiased")
    wait = "new Promise(done => { const look = () => document.querySelector('ul.search li a') ? done(true) : "
    wait += "setTimeout(look, 50); look(); })"
    page.js(wait)
    assert "Losses" in page.js("document.querySelector('ul.search').innerText")
