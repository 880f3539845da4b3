"The search service: answers, refusals, limits, workers that die, a hundred searches at once, a browser."

import asyncio
import concurrent.futures
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageDraw

from s5vh_nb.basics.config import DMMHConfig, PlusConfig
from s5vh_nb.cli import service as serving
from s5vh_nb.cli.command import main
from s5vh_nb.datasets.catalog import load
from s5vh_nb.datasets.decode import read_clip
from s5vh_nb.datasets.extract import EXTRACTION, make_extractor
from s5vh_nb.models.dmmh import DMMH
from s5vh_nb.models.plus import Plus
from s5vh_nb.search.index import HashIndex
from s5vh_nb.search.queries import VOCABULARY, CaptionModel, Search, VideoModel, encode_pairs
from s5vh_nb.search.videos import filmstrip

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
BOMB = b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\0;"  # 65535 x 65535 pixels
EVIL = "<i>'\"&"  # a label that would be markup


def gif(path, level, i):
    "A square in one of some colours that moves over a ground that depends on `i`."
    frames = [Image.new("RGB", (24, 24), (16 * i, 255 - 16 * i, 37 * i % 256)) for _ in range(4)]
    for step, frame in enumerate(frames):
        ImageDraw.Draw(frame).rectangle((4 * step, 8, 4 * step + 8, 16), (level, 40, 255 - level))
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


def save_model(folder, files):
    "A network that was not trained, but whose bits are balanced over some videos."
    torch.manual_seed(0)
    net, extractor = Plus(PlusConfig(d=512, bits=32, m=16, depth=1)), make_extractor("histogram")
    net.balance.momentum = 1.0
    with torch.no_grad():
        net(torch.tensor(np.stack([extractor(read_clip(file, 4, extractor.view).frames) for file in files])))
    net.save_pretrained(folder)
    settings = {"extractor": "histogram", "weights": "standard", "frames": 4, "d": 512}
    (folder / EXTRACTION).write_text(json.dumps({"settings": settings}), encoding="utf-8")


@pytest.fixture(scope="module")
def way(tmp_path_factory):
    "A folder with videos, a model, and an index of its codes; two paths lead out of the folder of videos."
    folder = tmp_path_factory.mktemp("service")
    paths = [f"{color}/{i}.gif" for i in range(15) for color in ("red", "blue")]
    for i, path in enumerate(paths):
        gif(folder / "videos" / path, 255 if path[0] == "r" else 0, i // 2)
    save_model(folder / "model", [folder / "videos" / path for path in paths])
    gif(folder / "secret.gif", 100, 3)
    (folder / "videos" / "link.gif").symlink_to(folder / "secret.gif")
    paths += ["../secret.gif", str(folder / "secret.gif"), "link.gif", "gone.gif", "nul\0.gif"]
    model = VideoModel.open(folder / "model", device="cpu")
    codes = [model.encode(folder / "videos" / path) for path in paths[:30]]
    assert len(np.unique(np.concatenate(codes), axis=0)) > 20
    index = HashIndex(32)
    metadata = {"path": paths, "label": [EVIL] * 30 + ["out"] * 5}
    index.add(np.concatenate(codes + [model.encode(folder / "secret.gif")] * 5), metadata=metadata)
    index.save(folder / "videos.index")
    return folder


@pytest.fixture(scope="module")
def service(way):
    "A service of videos, with little room for uploads."
    options = dict(model=way / "model", videos=way / "videos", megabytes=1, device="cpu")
    with contextlib.closing(serving.Service(way / "videos.index", **options)) as service:
        yield service


@pytest.fixture(scope="module")
def url(service):
    with serving.in_background(service) as address:
        yield address


def ask(url, data=None, headers=()):
    "Status, headers and body of an answer."
    request = urllib.request.Request(url, data, dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def send(url, content, name="new.gif", kind="image/gif", top="10", field="video", headers=()):
    "The answer to a form with a file."
    parts = [
        f'--edge\r\nContent-Disposition: form-data; name="top"\r\n\r\n{top}\r\n'.encode(),
        f'--edge\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n'.encode(),
        f"Content-Type: {kind}\r\n\r\n".encode() + content + b"\r\n--edge--\r\n",
    ]
    return ask(url, b"".join(parts), {"Content-Type": "multipart/form-data; boundary=edge", **dict(headers)})


def found(answer):
    "Ids and distances of an answer in JSON."
    assert answer[0] == 200, answer
    return [(item["id"], item["distance"]) for item in json.loads(answer[2])["found"]]


def expected(search, query, top=10):
    one = search.search(query, top)
    return list(zip(one.ids[0].tolist(), one.distances[0].tolist()))


# Answers


def test_answers_are_those_of_the_search(way, url):
    search = Search.open(way / "model", way / "videos.index", device="cpu")
    for i in (4, 7):
        content = (way / "videos" / search.index.about([i]).path[i]).read_bytes()
        answer = send(f"{url}/search", content, top="0000000007")
        assert found(answer) == expected(search, content, 7)
        one = search.index.search(search.index.codes([i]), 7)
        assert found(ask(f"{url}/search?id={i}&top=7")) == list(
            zip(one.ids[0].tolist(), one.distances[0].tolist())
        )
        told = json.loads(answer[2])
        assert told["query"] == "new.gif" and told["found"][0]["about"]["label"] == EVIL
        assert told["more"] == one.ties[0] - (one.distances[0] == one.distances[0].max()).sum()
    assert len(found(ask(f"{url}/search?id=0&top=100"))) == 35


@contextlib.contextmanager
def of_items(folder, metadata, videos=None):
    "The address of a service that takes ids of three items."
    index = HashIndex(16)
    index.add(np.array([[0, 0], [0, 1], [0, 3]], np.uint8), metadata=metadata)
    index.save(folder / "items.index")
    with serving.in_background(serving.Service(folder / "items.index", None, videos, workers=1)) as url:
        yield url


def test_an_index_without_metadata(tmp_path):
    with of_items(tmp_path, None) as url:
        answer = ask(f"{url}/search?id=0&top=2")
        assert found(answer) == [(0, 0), (1, 1)]
        assert [row["about"] for row in json.loads(answer[2])["found"]] == [{}, {}]
        assert "1. item 0" in ask(f"{url}/?id=0")[2].decode()
        assert ask(f"{url}/strip/0")[0] == 404


def test_links_in_a_circle_are_no_videos(tmp_path):
    (tmp_path / "loop.gif").symlink_to("loop.gif")
    with of_items(tmp_path, {"path": ["loop.gif"] * 3}, tmp_path) as url:
        answer = ask(f"{url}/search?id=0")
        assert answer[0] == 200 and [item["strip"] for item in json.loads(answer[2])["found"]] == [None] * 3
        assert ask(f"{url}/strip/0")[0] == 404


def test_where_nothing_is_found_there_is_no_more(tmp_path):
    "As an approximate search may do."
    index = HashIndex(64)
    index.add(np.zeros((64, 8), np.uint8))
    index.approximate("multihash", 0)
    index.save(tmp_path / "x.index")
    with contextlib.closing(serving.Service(tmp_path / "x.index", workers=1)) as service:
        answer = service._search(np.full((1, 8), 255, np.uint8), 10, "a query")
    assert (answer.found, answer.more) == ([], 0)


def test_numbers_of_the_metadata_are_exact(tmp_path):
    numbers = [0.12345678901234568, 1e-12, float("nan")]
    told = {
        "x": numbers,
        "f": np.array([0.1, 1, 2], np.float32),
        "n": [2**53 + 1, 0, -1],
        "yes": [True, False, True],
        "text": ["a", "", "é"],
    }
    with of_items(tmp_path, told) as url:
        rows = [row["about"] for row in json.loads(ask(f"{url}/search?id=0")[2])["found"]]
    told["x"], told["f"] = [*numbers[:2], None], told["f"].tolist()
    assert rows == [{name: values[i] for name, values in told.items()} for i in range(3)]
    assert [type(rows[0][name]) for name in told] == [float, float, int, bool, str]


def test_the_page_shows_texts_as_texts(way, url):
    "What was found, ties, links, pictures; markup in names and labels is none."
    status, headers, body = send(url, (way / "videos/red/0.gif").read_bytes(), name="<b>é&.gif", top="3")
    text = body.decode()
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "Nearest to &lt;b&gt;é&amp;.gif" in text and "<b>" not in text and EVIL not in text
    assert text.count('<li class="item">') == 3 and text.count("data:image/webp;base64,") == 2
    assert 'src="/strip/0"' in text and 'href="/?id=0&amp;top=10#found"' in text
    assert "<title>&lt;b&gt;" in text and '<html lang="en">' in text
    empty = ask(url)[2].decode()
    assert "Nearest" not in empty and 'type="file"' in empty and "caption" not in empty


def test_filmstrips(way, url, service, monkeypatch):
    "Long and short ones of the stored video, drawn once, and not more kept than there is room for."
    pictures = [Image.open(io.BytesIO(ask(f"{url}/strip/2{short}")[2])) for short in ("", "?short=1")]
    assert [picture.size for picture in pictures] == [(796, 96), (396, 96)]
    strip = filmstrip(way / "videos/red/1.gif").astype(int)
    assert abs(np.asarray(pictures[0]).astype(int) - strip[:, :-4]).mean() < 6
    monkeypatch.setattr(serving, "_KEPT", 2)
    for i in (0, 1, 4):
        assert ask(f"{url}/strip/{i}")[1]["content-type"] == "image/webp"
    assert list(service._kept) == [1, 4]
    monkeypatch.setattr(service.workers, "run", None)
    assert ask(f"{url}/strip/1")[0] == 200
    assert list(service._kept) == [4, 1]


@pytest.mark.parametrize("i", range(30, 35))
def test_no_path_leads_out_of_the_videos(url, i):
    "Above the folder, absolute, through a link, nowhere, no path at all."
    status, _, body = ask(f"{url}/strip/{i}")
    assert (
        status == 404
        and json.loads(body)["error"] == f"There is no video of item {i} in the folder of videos."
    )
    item = json.loads(ask(f"{url}/search?id={i}&top=100")[2])["found"]
    assert {row["id"]: row["strip"] for row in item}[i] is None


def test_names_of_uploads_are_never_paths(way, url, tmp_path, monkeypatch):
    "And nothing of an upload is left."
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    content = (way / "videos/red/0.gif").read_bytes()
    before = sorted(way.rglob("*"))
    for name in ("../../secret.gif", "/etc/passwd", "a\\b", "x" * 500):
        answer = send(f"{url}/search", content, name=name)
        assert found(answer)[0] == (0, 0) and len(json.loads(answer[2])["query"]) <= 100
    assert send(f"{url}/search", b"no video", name="/etc/passwd")[0] == 422
    assert not list(tmp_path.iterdir()) and sorted(way.rglob("*")) == before


def test_names_of_half_characters(way, url):
    "Some charsets can name what UTF-8 can't hold."
    content, kind = (way / "videos/red/0.gif").read_bytes(), "multipart/form-data; boundary=edge; charset="
    for charset, query in (("raw_unicode_escape", "?.gif"), ("utf-8", "\\ud800.gif")):
        headers = {"Content-Type": kind + charset}
        answer = send(f"{url}/search", content, name="\\ud800.gif", headers=headers)
        assert found(answer)[0] == (0, 0) and json.loads(answer[2])["query"] == query
        assert send(url, content, name="\\ud800.gif", headers=headers)[0] == 200


def test_kinds_are_the_same_in_capitals(way, url):
    content, headers = (
        (way / "videos/red/0.gif").read_bytes(),
        {"Content-Type": "Multipart/Form-Data; Boundary=edge"},
    )
    assert found(send(f"{url}/search", content, kind="Image/GIF", headers=headers))[0] == (0, 0)


def test_health_and_description(url):
    facts = {"status": "ok", "items": 35, "bits": 32, "takes": "video", "workers": 2}
    assert json.loads(ask(f"{url}/health")[2]) == facts
    paths = json.loads(ask(f"{url}/openapi.json")[2])["paths"]
    assert set(paths) == {"/search", "/strip/{id}", "/health"}
    assert "multipart/form-data" in paths["/search"]["post"]["requestBody"]["content"]
    assert [ask(url + page)[0] for page in ("/docs", "/redoc")] == [404, 404], (
        "pages that load from elsewhere"
    )


# Captions


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    "A folder with a model of emoji that was not trained, and an index."
    folder, data = tmp_path_factory.mktemp("captions"), load("emoji")
    torch.manual_seed(0)
    widths = {name: data.widths[name] for name in ("di", "dt")}
    DMMH(DMMHConfig(**widths, bits=32, width=16, layers=1, cnn_width=8)).save_pretrained(folder / "model")
    (folder / "model" / VOCABULARY).write_text(json.dumps(data.vocabulary), encoding="utf-8")
    arrays = encode_pairs(folder / "model", data, "cpu", progress=False)
    index = HashIndex(int(arrays.pop("bits")), str(arrays.pop("model")))
    index.add(arrays.pop("codes"), metadata=arrays)
    index.save(folder / "emoji.index")
    return folder


def test_captions(captions, capsys):
    "The bundled emoji, found by words and shown as drawings; unknown words are said."
    search = Search.open(captions / "model", captions / "emoji.index", device="cpu")
    service = serving.Service(captions / "emoji.index", captions / "model", workers=1, device="cpu")
    with serving.in_background(service) as url:
        asked = urllib.parse.urlencode({"caption": "happy CAT, sunglasess & qqq", "top": 5})
        told = json.loads((answer := ask(f"{url}/search?{asked}"))[2])
        assert found(answer) == expected(search, "happy cat", 5)
        assert told["left_out"] == {"sunglasess": "sunglasses", "qqq": None}
        first = told["found"][0]
        assert first["strip"] == f"/strip/{first['id']}" and {"name", "words", "label"} <= set(first["about"])
        assert Image.open(io.BytesIO(ask(url + first["strip"])[2])).size == (64, 64)
        page = ask(f"{url}/?{asked}")[2].decode()
        assert "Drawings by OpenMoji" in page and 'type="file"' not in page
        said = "Left out, since the model does not know them: sunglasess (did you mean sunglasses?), qqq."
        assert f"<p>{said}</p>" in page and "at least two letters or digits" in page
        words = ["--model", str(captions / "model"), "--caption", "happy CAT, sunglasess & qqq"]
        assert main(["search", str(captions / "emoji.index"), *words]) == 0
        assert capsys.readouterr().out.splitlines()[0] == said
        assert (
            'value="happy CAT, sunglasess &amp; qqq"' in page and f"Drawing: {first['about']['name']}" in page
        )
        status, _, body = ask(f"{url}/search?caption=qqq")
        assert status == 422 and "at least one of the 1613 words" in json.loads(body)["error"]
        assert send(f"{url}/search", b"GIF89a")[0] == 422


@pytest.mark.parametrize(
    ("text", "error", "found"),
    [
        (None, FileNotFoundError, "no such file"),
        ('["cat", ', ValueError, "Expecting value"),
        ("3", ValueError, "not iterable"),
        ('["cat"]', ValueError, "1 entries"),
        (json.dumps(["cat"] * 1613), ValueError, "1613 entries"),
        (json.dumps([*range(1613)]), ValueError, "1613 entries"),
    ],
)
def test_a_model_without_its_words(captions, tmp_path, text, error, found):
    shutil.copytree(captions / "model", tmp_path / "model")
    path = tmp_path / "model" / VOCABULARY
    path.unlink() if text is None else path.write_text(text, encoding="utf-8")
    expected = f"{re.escape(str(path))}: expected the 1613 words of the text, .*{found}"
    with pytest.raises(error, match=expected):
        CaptionModel.open(tmp_path / "model", device="cpu")


def test_suggestions_are_few(captions, monkeypatch):
    "Each takes some milliseconds."
    asked, model = [], CaptionModel.open(captions / "model", device="cpu")
    monkeypatch.setattr("difflib.get_close_matches", lambda word, *given: asked.append(word) or ["cat"])
    words = [f"qq{i}" for i in range(140)]
    assert model.unknown(" ".join(words)) == dict.fromkeys(words) | dict.fromkeys(words[:5], "cat")
    model.encode(" ".join(["cat", *words]))
    assert asked == words[:5]


# Refusals


REFUSED = {  # status and part of the sentence: address, form
    (422, "not for both"): ("/search?id=1&caption=a", None),
    (422, f"id: a whole number from 0 to {2**63 - 1} is needed, not 'x'."): ("/search?id=x", None),
    (422, f"id: a whole number from 0 to {2**63 - 1} is needed, not '{2**63}'."): (
        f"/search?id={2**63}",
        None,
    ),
    (422, "top: a whole number from 1 to 100 is needed, not '101'."): ("/search?id=1&top=101", None),
    (422, f"id: a whole number from 0 to {2**63 - 1} is needed, not '-1'."): ("/strip/-1", None),
    (422, "short: true or false is needed, not 'x'."): ("/strip/1?short=x", None),
    (422, "caption: a text of 1 to 1000 characters is needed, not ''."): ("/search?caption=", None),
    (422, "takes a video or the id of an item, not a caption"): ("/search?caption=cat", None),
    (404, "There is no item 35 among the 35 items"): ("/search?id=35", None),
    (404, f"There is no item {2**63 - 1}"): (f"/strip/{2**63 - 1}", None),
    (404, "There is nothing at /strip/../secret.gif"): ("/strip/../secret.gif", None),
    (405, "does not take such a request"): ("/health", {"content": b""}),
    (415, "is needed, not text/plain"): ("/search", {"content": b"a", "kind": "text/plain"}),
    (422, "No video was sent"): ("/search", {"content": b"a", "field": "film"}),
    (422, "How many: a whole number from 1 to 100"): ("/search", {"content": b"a", "top": "101"}),
    (422, "not '0000000016000'"): ("/search", {"content": b"a", "top": "0000000016000"}),
    (422, "not '00000000100000000000'"): ("/search", {"content": b"a", "top": "000000001" + "0" * 5000}),
    (422, "1 to 100 is needed, not '٠'"): ("/search", {"content": b"a", "top": "٠"}),  # a zero
    (422, "found an empty file"): ("/search", {"content": b""}),
    (422, "a.mp4: expected a video, found"): (
        "/search",
        {"content": b"text" * 99, "name": "a.mp4", "kind": "video/mp4"},
    ),
    (422, "could be decompression bomb"): ("/search", {"content": BOMB}),
    (422, "found: Invalid argument"): (
        "/search",
        {"content": b"ffconcat version 1.0\nfile secret.gif\n", "name": "list.mp4", "kind": "video/mp4"},
    ),
}


@pytest.mark.parametrize("wanted", REFUSED, ids=lambda wanted: wanted[1][:30])
def test_refusals(url, wanted):
    "A sentence says what was wrong, to a program and on the page."
    (status, sentence), (place, form) = wanted, REFUSED[wanted]
    for place in {place, place.replace("/search", "/")}:
        answer = ask(url + place) if form is None else send(url + place, **form)
        assert answer[0] == status, answer
        if answer[1]["content-type"] == "application/json":
            assert sentence in json.loads(answer[2])["error"]
        else:
            assert 'role="alert"' in answer[2].decode() and "<title>Error: " in answer[2].decode()


def test_a_form_that_is_none(url):
    assert ask(f"{url}/search")[0] == 422
    for kind in ("multipart/form-data", "multipart/form-data; boundary=edge; charset=none"):
        assert send(f"{url}/search", b"GIF89a", headers={"Content-Type": kind})[0] in (400, 422)
    assert ask(f"{url}/search", b"{}", {"Content-Type": "application/json"})[0] == 415
    for head in ("multipart/form-data", "multipart/form-data; boundary=edge"):
        assert ask(f"{url}/search", b"--other\r\n\r\n", {"Content-Type": head})[0] in (400, 422)


@pytest.mark.parametrize("headers", [{"Content-Length": "99000000"}, {"Transfer-Encoding": "chunked"}])
def test_reading_stops_at_the_limit(url, headers, monkeypatch):
    "The answer is there although most of the file was not sent, or after all of it was."
    assert send(f"{url}/", bytes(5_000_000))[0] == 413
    monkeypatch.setattr(serving, "_LINGER", 0.1)
    head = {
        "Host": url.removeprefix("http://"),
        "Content-Type": "multipart/form-data; boundary=edge",
        **headers,
    }
    piece = b'--edge\r\nContent-Disposition: form-data; name="video"; filename="a.gif"\r\n\r\n' + bytes(
        1_100_000
    )
    framed = b"%x\r\n%b\r\n" % (len(piece), piece) if "Transfer-Encoding" in headers else piece
    with socket.create_connection(urllib.parse.urlsplit(url)[1].split(":")) as wire:
        lines = ["POST /search HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
        wire.sendall("\r\n".join(lines).encode() + framed)
        wire.settimeout(20)
        answer = wire.recv(9999)
        while piece and b"}" not in answer:
            answer += (piece := wire.recv(9999))
    assert answer.startswith(b"HTTP/1.1 413 ") and b"too large. At most 1 MB" in answer


def test_other_names_and_other_sites(way, url):
    "Under an unknown name nothing is told, not even the name of the index; forms of other sites are refused."
    content = (way / "videos/red/0.gif").read_bytes()
    for place in ("", "search?id=1", "strip/1", "health", "?top=x", "nothing", "openapi.json", "search/"):
        for answer in (
            ask(f"{url}/{place}", headers={"Host": "evil.example"}),
            send(f"{url}/{place}", content, headers={"Host": "evil.example"}),
        ):
            assert answer[0] == 421 and "not as evil.example" in json.loads(answer[2])["error"], place
            assert b"videos.index" not in answer[2]
    for headers, status in (
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": url, "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "null", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": url}, 200),
        ({"Origin": url, "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": f"localhost:{url.rpartition(':')[2]}"}, 200),
    ):
        for place in ("/", "/search"):
            assert send(url + place, content, headers=headers)[0] == status, headers


@pytest.mark.parametrize("place", ["/", "/search?id=0", "/nothing", "/?id=x", "/strip/0"])
def test_headers(url, place):
    headers = ask(url + place)[1]
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "script-src" not in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "same-origin"
    assert headers["cache-control"] == "no-store" and "server" not in headers


# Workers


@pytest.fixture
def lone(way):
    "A service with one worker, and its address."
    options = dict(videos=way / "videos", workers=1, device="cpu")
    service = serving.Service(way / "videos.index", way / "model", **options)
    with serving.in_background(service) as url:
        yield service, url


def worker_of(service):
    return service.workers._all[0]._process


def wait_for(ready):
    "What a function returns once it is true."
    end = time.monotonic() + 60
    while not (result := ready()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return result


def test_what_kills_a_worker_costs_one_request_at_most(way, lone):
    "Once: it is tried again. Twice: a sentence. In idleness: nobody notices."
    service, url = lone
    content = (way / "videos/red/0.gif").read_bytes()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for deaths in (1, 2):
            old = worker_of(service)
            os.kill(old.pid, signal.SIGSTOP)  # it holds the job until it is killed
            job = pool.submit(send, f"{url}/search", content)
            wait_for(service.workers._free.empty)
            old.kill()
            if deaths == 2:
                wait_for(lambda: (new := worker_of(service)) is not old and new).kill()
            answer = job.result(60)
            assert answer[0] == (200, 503)[deaths - 1]
    assert "Two workers broke off" in json.loads(answer[2])["error"]
    for _ in range(2):
        assert found(send(f"{url}/search", content))[0] == (0, 0)
        worker_of(service).kill()
        worker_of(service).join()
    assert json.loads(ask(f"{url}/health")[2])["workers"] == 0
    assert ask(f"{url}/strip/0")[0] == 200


def test_what_takes_too_long_is_stopped(way, lone):
    "The worker that hangs goes, and the next request finds another one. A slow sender is stopped, too."
    service, url = lone
    content, old = (way / "videos/red/0.gif").read_bytes(), worker_of(service)
    os.kill(old.pid, signal.SIGSTOP)
    service.seconds = 0.2
    status, _, body = send(f"{url}/search", content)
    assert status == 504 and "longer than 0.2 seconds" in json.loads(body)["error"]
    with socket.create_connection(urllib.parse.urlsplit(url)[1].split(":")) as wire:
        head = f"POST /search HTTP/1.1\r\nHost: {urllib.parse.urlsplit(url)[1]}\r\nContent-Length: 100\r\n"
        wire.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=edge\r\n\r\n--edge")
        assert wire.recv(99).startswith(b"HTTP/1.1 504 ")
    service.seconds = 60
    assert found(send(f"{url}/search", content))[0] == (0, 0)
    assert worker_of(service) is not old and not old.is_alive()


def test_who_waits_in_vain_hears_that_it_is_busy(way, lone):
    "It is not the video that takes long."
    service, url = lone
    content, worker = (way / "videos/red/0.gif").read_bytes(), worker_of(service)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        os.kill(worker.pid, signal.SIGSTOP)
        first = pool.submit(send, f"{url}/search", content)
        wait_for(service.workers._free.empty)
        service.seconds = 0.2
        for answer in (send(f"{url}/search", content), ask(f"{url}/strip/0")):
            assert answer[0] == 503 and "is busy, and did not come to this within 0.2" in answer[2].decode()
        os.kill(worker.pid, signal.SIGCONT)
        assert found(first.result(60))[0] == (0, 0) and worker_of(service) is worker
    assert not service.workers.waiting


def test_few_uploads_are_read_at_once(way, lone, monkeypatch):
    "The others wait unread, and not too many of them."
    service, url = lone
    content, worker, read = (way / "videos/red/0.gif").read_bytes(), worker_of(service), []
    form = serving._form
    monkeypatch.setattr(serving, "_form", lambda *given: read.append(1) or form(*given))
    monkeypatch.setattr(serving, "_WAITING", 3)
    monkeypatch.setattr(service, "_uploads", asyncio.Semaphore(2))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        os.kill(worker.pid, signal.SIGSTOP)
        jobs = [pool.submit(send, f"{url}/search", content) for _ in range(4)]
        wait_for(lambda: len(service.workers.waiting) == 3)  # two for a place, one for the worker
        status, _, body = send(f"{url}/search", content)
        assert status == 503 and "too many requests wait" in json.loads(body)["error"] and len(read) == 2
        os.kill(worker.pid, signal.SIGCONT)
        assert [found(job.result(60))[0] for job in jobs] == 4 * [(0, 0)]
    assert len(read) == 4 and not service.workers.waiting


def test_an_error_of_our_own_is_told_as_one(url, service, monkeypatch):
    def failing(*given):
        raise KeyError("secret")

    monkeypatch.setattr(service, "_search", failing)
    status, _, body = ask(f"{url}/?id=1")
    assert status == 500 and "Something went wrong here" in body.decode() and "secret" not in body.decode()


# The command


@contextlib.contextmanager
def ending(made, seconds=120):
    "A process that ends at last, so that nobody reads from it for ever."
    (timer := threading.Timer(seconds, made.kill)).start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def process(way):
    "A service in a process of its own, and its address."
    options = dict(model="model", videos="videos", device="cpu", port=0)
    words = [
        sys.executable,
        "-c",
        f"from s5vh_nb.cli.service import serve; serve('videos.index', **{options})",
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    with subprocess.Popen(words, cwd=way, **pipes) as made, ending(made):
        try:
            assert made.stdout.readline().startswith("videos.index: it is opened")
            yield made, re.search(r"http://\S+", made.stdout.readline())[0]
        finally:
            made.kill()


def test_a_hundred_at_once(way):
    "Videos, ids, filmstrips and broken files; a worker is killed in between; then Ctrl-C."
    search = Search.open(way / "model", way / "videos.index", device="cpu")
    contents = {i: (way / "videos" / search.index.about([i]).path[i]).read_bytes() for i in range(30)}
    wanted = {i: expected(search, content) for i, content in contents.items()}
    by_id = {i: search.index.search(search.index.codes([i]), 10).ids[0].tolist() for i in range(30)}

    def one(number):
        i = number % 30
        if number % 10 < 6:
            return found(send(f"{url}/search", contents[i])) == wanted[i]
        if number % 10 < 8:
            return [row for row, _ in found(ask(f"{url}/search?id={i}"))] == by_id[i]
        if number % 10 == 8:
            return ask(f"{url}/strip/{i}")[0] == 200
        if number % 20 == 9:
            return send(f"{url}/search", contents[i][:20])[0] == 422
        with socket.create_connection(urllib.parse.urlsplit(url)[1].split(":")) as wire:  # breaks off
            head = f"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: {10**6}\r\n"
            wire.sendall(
                head.encode() + b"Content-Type: multipart/form-data; boundary=edge\r\n\r\n--edge\r\n"
            )
        return True

    with process(way) as (made, url):
        forks = [each for each in psutil.Process(made.pid).children(recursive=True) if not each.children()]
        workers = [each for each in forks if each.ppid() != made.pid]
        assert len(workers) == 2
        with concurrent.futures.ThreadPoolExecutor(100) as pool:
            jobs = [pool.submit(one, number) for number in range(100)]
            next(concurrent.futures.as_completed(jobs))
            workers[0].kill()
            assert [number for number, job in enumerate(jobs) if not job.result(60)] == []
        assert json.loads(ask(f"{url}/health")[2])["items"] == 35
        made.send_signal(signal.SIGINT)
        assert made.wait(30) == 0 and made.stdout.read() == ""
        psutil.wait_procs(forks, 10)
        assert not [each for each in forks if each.is_running()]


def test_ctrl_c_while_it_starts(way):
    "As of a terminal, for all its processes: the command ends, and says nothing."
    # what a shell runs in the background, these tests for instance, hands on that Ctrl-C means nothing
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from s5vh_nb.cli.command import main; exit(main())"
    words = [sys.executable, "-X", "faulthandler", "-c", code, "serve", "videos.index", "--port", "0"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    with subprocess.Popen(words, cwd=way, start_new_session=True, **pipes) as made, ending(made):
        try:
            assert made.stdout.readline().startswith("videos.index: it is opened")
            forks = psutil.Process(made.pid).children
            wait_for(lambda: any("torch" in file.path for each in forks() for file in each.memory_maps()))
            server = forks()
            os.killpg(made.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                made.wait(60)
            if made.returncode is None:  # it says where it stands
                made.send_signal(signal.SIGABRT)
            assert made.communicate(timeout=240)[0] == ""  # its server of workers first ends its imports
            assert made.returncode == 0
            assert psutil.wait_procs(server, 10)[1] == []
        finally:
            made.kill()


def test_commands_name_what_is_wrong(way, captions, monkeypatch, capsys):
    monkeypatch.chdir(way)
    HashIndex(32).save("empty.index")
    (index := HashIndex(16)).add(np.zeros((1, 2), np.uint8))
    index.save("short.index")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for line, message in (
            ("none.index", "none.index: expected a file that"),
            ("empty.index", "empty.index: expected at least one item"),
            (
                "short.index --model model",
                "short.index: expected codes of 32 bits, as the model gives, found 16",
            ),
            ("videos.index --model nowhere", "nowhere/config.json: expected"),
            ("videos.index --videos nowhere", "nowhere: expected a folder of videos"),
            ("videos.index --workers 0", "workers: expected at least 1"),
            (
                "videos.index --seconds 0",
                "megabytes, seconds: expected finite numbers above 0, found 64, 0.0",
            ),
            ("videos.index --seconds inf", "expected finite numbers above 0, found 64, inf"),
            ("videos.index --megabytes nan", "expected finite numbers above 0, found nan, 60"),
            ("videos.index --megabytes inf", "expected finite numbers above 0, found inf, 60"),
            ("videos.index --megabytes -1", "expected finite numbers above 0, found -1.0, 60"),
            (
                f"videos.index --port {port}",
                f"127.0.0.1, port {port}: expected an address of this machine, and a port that is free, "
                "found: Address already in use\n",
            ),
            ("videos.index --port 70000", "port: expected a number from 0"),
            ("videos.index --host 192.0.2.1", "192.0.2.1, port 0: expected an address of this machine"),
        ):
            words = line.split() if "--port" in line else [*line.split(), "--port", "0"]
            assert main(["serve", *words]) == 2, line
            assert message in capsys.readouterr().err, line
    assert not [each for each in psutil.Process().children(recursive=True) if each.status() == "zombie"]


def test_another_address_is_said_to_be_open(way, monkeypatch, capsys):
    "A warning, and the host names that are known there."
    from uvicorn import Server

    monkeypatch.setattr(Server, "run", lambda self, sockets: self.config.load())
    known, make = [], serving._make_app
    monkeypatch.setattr(serving, "_make_app", lambda *given: known.append(given[1]) or make(*given))
    assert (
        main(
            [
                "serve",
                str(way / "videos.index"),
                "--host",
                "0.0.0.0",
                "--port",
                "0",
                "--name",
                "found.example",
            ]
        )
        == 0
    )
    said = capsys.readouterr()
    assert "0.0.0.0 can be reached from other machines" in said.err and "with --name" in said.err
    assert f"http://{socket.gethostname()}:" in said.out
    assert main(["serve", str(way / "videos.index"), "--host", "127.0.0.2", "--port", "0"]) == 0
    said = capsys.readouterr()
    assert not said.err and "http://127.0.0.2:" in said.out
    loopback = {"localhost", "127.0.0.1", "::1"}
    assert set(known[0]) == loopback | {"0.0.0.0", "found.example", socket.gethostname().lower()}
    assert set(known[1]) == loopback | {"127.0.0.2"}


def test_what_is_reached_from_here_only():
    for host in ("localhost", "127.0.0.1", "127.0.0.2", "::1", "0:0:0:0:0:0:0:1"):
        assert serving._only_here(host), host
    for host in ("0.0.0.0", "::", "192.0.2.1", "localhost.example", "127.example"):
        assert not serving._only_here(host), host


# The page in a browser


@pytest.fixture
def page(browser):
    "The browser with nothing said yet, wide and light."
    browser.said.clear()
    browser.look(1000, "light")
    return browser


SEEN = "[...document.images].map(i => i.complete && i.naturalWidth)"


def test_a_form_finds_and_shows(page, way, url):
    "A video is chosen and sent; the browser shows all pictures, blocks nothing, and goes on to a neighbour."
    page.open(url)
    page.choose(way / "videos" / "red" / "3.gif")
    page.js("document.querySelector('#top-video').value = 4")
    page.loading("Runtime.evaluate", expression="document.querySelector('[enctype] button').click()")
    assert page.js("document.querySelector('h2#found').innerText") == "Nearest to 3.gif"
    assert page.js("[...document.querySelectorAll('h3')].map(h => h.innerText)")[0] == "1. red/3.gif"
    assert (widths := page.js(SEEN))[1:] and set(widths) == {796} and page.js("location.hash") == "#found"
    page.loading("Runtime.evaluate", expression="document.querySelector('li a').click()")
    assert page.js("document.querySelector('h2#found').innerText") == "Nearest to item 6"
    assert not page.said, "blocked by the page's own policy?"


def test_an_error_in_the_browser(page, way, url, tmp_path):
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    (tmp_path / "large.gif").write_bytes(bytes(3_000_000))
    for name, sentence in (("broken.gif", "expected an animated picture"), ("large.gif", "At most 1 MB")):
        page.open(url)
        page.choose(tmp_path / name)
        page.loading("Runtime.evaluate", expression="document.querySelector('[enctype] button').click()")
        assert sentence in page.js("document.querySelector('[role=alert]').innerText")
        assert page.js("document.title").startswith("Error: ") and page.js("document.forms.length") == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen(page, url, scheme):
    "Nothing sticks out at 320 pixels; the short filmstrips are shown; the owner's colours are taken."
    page.look(320, scheme)
    page.open(f"{url}/?id=6")
    assert page.js("document.documentElement.scrollWidth") == 320
    page.js("document.images[0].scrollIntoView()")
    assert (widths := page.js(SEEN)) and set(widths) == {396}
    ground = [int(x) for x in re.findall(r"\d+", page.js("getComputedStyle(document.body).backgroundColor"))]
    assert (np.mean(ground) > 128) == (scheme == "light")


def test_the_keyboard_reaches_everything_and_shows_where_it_is(page, url):
    page.open(f"{url}/?id=6&top=2")
    reached = []
    for _ in range(page.js("document.querySelectorAll('a, input, button').length")):
        page.press("Tab", 9)
        reached.append(page.js("document.activeElement.innerText || document.activeElement.id"))
        assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid", reached
    wanted = "Skip to the search;video;top-video;Search by video;id;top-id;Search by id"
    assert ";".join(reached[:7]) == wanted and len(set(reached)) == len(reached) == 10
    page.open(url)
    page.js("document.querySelector('#id').focus(); document.querySelector('#id').value = 4")
    page.loading("Input.dispatchKeyEvent", type="char", key="Enter", text="\r", windowsVirtualKeyCode=13)
    assert page.js("location.search") == "?id=4&top=10"


def test_a_screen_reader_hears_what_things_are(page, url):
    "Roles and names in the tree that a browser makes for it."
    page.open(f"{url}/?id=6&top=2")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    heard = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if "role" in node]
    for wanted in (
        ("search", "What to search for"),
        ("form", "By a video"),
        ("button", "Video file"),
        ("spinbutton", "Its id"),
        ("heading", "Nearest to item 6"),
        ("region", "Nearest to item 6"),
        ("image", "Frames of red/3.gif"),
        ("link", "Nearest to this one (red/3.gif)"),
    ):
        assert wanted in heard, [each for each in heard if each[0] == wanted[0]]
    roles = [role for role, _ in heard]
    assert {"main", "banner", "contentinfo", "status", "list"} <= set(roles)
    assert all(name for role, name in heard if role in ("textbox", "spinbutton", "button", "link", "image"))


def luminance(color):
    parts = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [
        0.2126,
        0.7152,
        0.0722,
    ]


def test_contrast():
    "At least 4.5 to 1 for every text on its ground, in both schemes (WCAG 2, 1.4.3)."
    schemes = re.findall(r":root \{(.+?)\}", serving._template(), re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colors = dict(re.findall(r"--([\w-]+): (#\w{6})", scheme))
        pairs = [(text, ground) for text in ("text", "soft", "accent") for ground in ("ground", "card")]
        for text, ground in [*pairs, ("on-accent", "accent"), ("wrong", "wrong-ground")]:
            low, high = sorted(luminance(colors[name]) for name in (text, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
