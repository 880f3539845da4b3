"From a folder of videos to a search: features, train, encode, index, search; resumed, refused, faulty."

import contextlib
import re
import runpy
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from huggingface_hub import HfApi
from PIL import Image, ImageDraw

from s5vh_nb.basics.files import only_run
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.cli.command import main
from s5vh_nb.cli.service import serve
from s5vh_nb.datasets.catalog import load
from s5vh_nb.datasets.decode import read_clip
from s5vh_nb.datasets.extract import EXTRACTION, make_extractor, read_settings
from s5vh_nb.datasets.video_files import read_manifest
from s5vh_nb.evidence import trained
from s5vh_nb.evidence.records import from_line
from s5vh_nb.evidence.trained import RECORD, model_card, train_into
from s5vh_nb.learning import training
from s5vh_nb.models.plus import WEIGHTS, Plus, pretrained
from s5vh_nb.search.index import HashIndex
from s5vh_nb.search.queries import Search
from s5vh_nb.search.videos import encode_videos, load_network, open_set

COLORS = {"red": (1, 0.2, 0.2), "blue": (0.2, 0.2, 1)}


def run(line, status=0):
    assert main(shlex.split(line)) == status, line


def gif(path, color, i):
    "A bar of one of two colours that moves over a grey ground."
    frames = [Image.new("RGB", (16, 16), (40 + 2 * i,) * 3) for _ in range(4)]
    for step, frame in enumerate(frames):
        shade = tuple(int(share * (120 + 2 * i)) for share in COLORS[color])
        ImageDraw.Draw(frame).rectangle((3 * step, i % 8, 3 * step + 4, i % 8 + 6), shade)
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder in which the way was gone once, with more training videos than bits."
    folder = tmp_path_factory.mktemp("way")
    for i in range(90):
        color = ("red", "blue")[i % 2]
        gif(folder / "videos" / color / f"{i}.gif", color, i)
    gif(folder / "new.mp4", "red", 7)  # contents decide, not the suffix
    with contextlib.chdir(folder):
        run("features videos features --extractor histogram --frames 4")
        run("train features model --epochs 3 --device cpu")
        run("encode model features codes.npz --device cpu")
        run("index codes.npz videos.index")
    return folder


@pytest.fixture
def way(made, tmp_path, monkeypatch):
    "A copy of it, which is the working directory."
    shutil.copytree(made, tmp_path / "way")
    monkeypatch.chdir(tmp_path / "way")
    return tmp_path / "way"


@pytest.fixture
def small(monkeypatch):
    "The command trains narrow networks of one layer, for one epoch where it is told no number."

    def config(dataset, profile, variant, **changes):
        if dataset == "emoji":
            return train_config(dataset, "smoke", variant, **changes)
        return train_config(dataset, profile, variant, **dict(m=16, depth=1, epochs=1) | changes)

    monkeypatch.setattr("s5vh_nb.cli.command.train_config", config)


def examples(command, capsys):
    "The command lines in the help of a command."
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return re.findall(r"^  s5vh-nb (.+)$", capsys.readouterr().out, re.MULTILINE)


def test_the_examples_of_the_help_work(way, small, capsys):
    "In their order, which is the way; networks and extractor are small here."
    read_manifest("features")[["path", "label"]].to_csv("labels.csv", index=False)
    for name in ("features", "model"):
        shutil.rmtree(name)
    features = [line for line in examples("features", capsys) if "--ray" not in line]  # see test_ray
    features = [f"{line} --extractor histogram --frames 3" for line in features]
    train = [f"{line} --device cpu" for line in examples("train", capsys)]
    search = [line for line in examples("search", capsys) if "--model" in line]
    assert (len(features), len(train), len(search)) == (2, 3, 3)
    index = ("index codes.npz new.index", "index emoji.npz emoji.index")
    for line in (*features, *train, *examples("encode", capsys), *index, *search):
        run(line.replace("videos.index", "new.index"))
    out = capsys.readouterr().out
    assert "emoji.npz: 1898 pairs, 64 bits" in out and "name                " in out
    assert "model: Plus, 64 bits, 68 videos, GmAP 0." in out
    assert "codes.npz: 90 videos, 64 bits" in out and "new.index: 90 items added" in out
    assert "\nfound.png\n" in out and (way / "found.png").is_file()


@pytest.mark.parametrize(("data", "expected"), [("features", 8), ("spoken-digits", 101)])
def test_few_videos_get_few_hash_centers(way, monkeypatch, data, expected):
    "One for eight videos to learn from, at most; there are 68."
    asked = create_autospec(train_into)
    monkeypatch.setattr("s5vh_nb.cli.command.train_into", asked)
    run(f"train {data} nowhere --variant paper --device cpu")
    assert asked.call_args.args[1].objective.n_centers == expected


def test_the_examples_of_a_service_are_understood(monkeypatch, capsys):
    "None is started."
    asked = create_autospec(serve)
    monkeypatch.setattr("s5vh_nb.cli.command.serve", asked)
    for line in examples("serve", capsys):
        run(line)
    found = [(call.kwargs["index"], call.kwargs["model"], call.kwargs["port"]) for call in asked.mock_calls]
    assert found == [
        ("videos.index", "model", 8000),
        ("emoji.index", "captions", 8080),
        ("videos.db", None, 8000),
    ]


def test_codes_and_neighbours_equal_those_by_hand(way, capsys):
    "One video at a time, bits counted one by one."
    extractor, net = make_extractor("histogram"), Plus.from_pretrained("model")
    paths = read_manifest("features").path

    def bits(file):
        x = extractor(read_clip(file, 4, extractor.view).frames)
        return np.unpackbits(net.encode(x[None]).numpy())

    by_hand = np.stack([bits(way / "videos" / path) for path in paths])  # (90, 64)
    arrays = np.load("codes.npz")
    assert arrays["path"].tolist() == paths.tolist()
    assert arrays["label"].tolist() == read_manifest("features").label.tolist()
    assert arrays["codes"].dtype == np.uint8 and arrays["bits"] == 64
    assert (np.unpackbits(arrays["codes"], axis=1) != by_hand).mean() < 0.001  # sums in another order
    capsys.readouterr()
    run("search videos.index new.mp4 --model model --top 4 --where label=red")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "query rank id distance path label split".split()
    stored = np.unpackbits(arrays["codes"], axis=1)
    distances = np.where(arrays["label"] == "red", (stored != bits("new.mp4")).sum(1), 99)
    nearest = np.argsort(distances, kind="stable")[:4]
    assert [[int(row[2]), int(row[3])] for row in lines[1:5]] == [[i, distances[i]] for i in nearest]
    assert [row[4] for row in lines[1:5]] == [paths[i] for i in nearest]
    more = (distances == distances[nearest[-1]]).sum() - (distances[nearest] == distances[nearest[-1]]).sum()
    assert len(lines) == 5 + (more > 0)


def test_one_object_answers(way):
    "What a service holds: a file and its bytes give the same answer."
    search = Search.open("model", "videos.index", device="cpu")
    path = read_manifest("features").path[5]
    found = search.search(way / "videos" / path, 3)
    assert (found.ids[0, 0], found.distances[0, 0]) == (5, 0) and found.ids.shape == (1, 3)
    for part, other in zip(found, search.search((way / "videos" / path).read_bytes(), 3)):
        np.testing.assert_array_equal(part, other)


def test_filmstrips(way, capsys):
    "One row more than results; a video whose file is gone has a row all the same."
    run("search videos.index new.mp4 --model model --top 3 --filmstrip all.png --videos videos")
    run("search videos.index new.mp4 --model model --top 3 --filmstrip none.png")
    both = [np.asarray(Image.open(name).convert("RGB")).astype(int) for name in ("all.png", "none.png")]
    assert both[0].shape == both[1].shape and 400 < both[0].shape[0] < 600
    colored = [(np.ptp(rows, -1) > 60).any(1) for rows in both]  # rows of pixels with colour in them
    starts = [int((np.diff(rows.astype(int)) > 0).sum()) for rows in colored]
    assert starts == [4, 1], "the query, and what was found where its file is"
    run("index codes.npz bare.index --manifest bare.csv", 2)  # no such table
    pd.DataFrame({"name": range(90)}).to_csv("bare.csv", index=False)
    run("index codes.npz bare.index --manifest bare.csv")
    capsys.readouterr()
    run("search bare.index new.mp4 --model model --filmstrip bare.png", 2)
    assert "bare.index: expected paths of its videos" in capsys.readouterr().err


def test_the_card_is_made_from_the_record(way):
    text = (way / "model" / "README.md").read_text(encoding="utf-8")
    record = from_line((way / "model" / RECORD).read_text(encoding="utf-8"), "record")
    data = open_set("features")
    assert text.endswith(model_card(record, read_settings("features")))
    for told in (
        data.fingerprint,
        "histogram",
        f"{record.metrics['GmAP']:.3f}",
        record.device,
        "library_name",
    ):
        assert told in text
    low, high = map(float, re.search(r"\| GmAP \| .+ \[(.+), (.+)\] \|", text).groups())
    assert low < round(record.metrics["GmAP"], 3) < high < low + 0.4
    space = run_example("model")
    codes, expected = (
        space["network"].encode(data.train.frames[:]),
        encode_videos("model", data, "cpu", progress=False),
    )
    np.testing.assert_array_equal(codes.numpy(), expected["codes"][: len(data.train)])
    assert space["codes"].shape == (2, codes.shape[1])


def run_example(folder):
    "What the example of a card makes, in the card's folder."
    block = re.search(r"```python\n(.+?)```", Path(folder, "README.md").read_text("utf-8"), re.DOTALL)[1]
    space = {}
    with contextlib.chdir(folder):
        exec(block, space)
    return space


@pytest.mark.parametrize("name", ["animated-emoji", "spoken-digits", "spoken-pairs"])
def test_cards_of_bundled_networks_are_current(name):
    "They state the network's scores of today, and the evidence; their example runs, and gives its codes."
    text = (WEIGHTS / name / "README.md").read_text(encoding="utf-8")
    number = re.compile(r"0\.\d{3}")
    made = runpy.run_path(str(ROOT / "tools" / "cards.py"))["card"](name)
    assert number.sub("", made) == number.sub("", text), "a card is stale (python tools/cards.py)"
    near = zip(map(float, number.findall(made)), map(float, number.findall(text)), strict=True)
    assert all(abs(new - old) <= 0.002 for new, old in near), "scores differ (python tools/cards.py)"
    codes = run_example(WEIGHTS / name)["codes"]
    assert torch.equal(codes, pretrained(name).encode(load(name).query.frames))


@pytest.mark.parametrize("variant", ["paper", "bsth"])
def test_the_example_for_pairs_runs(tmp_path, variant):
    config = train_config("emoji", "smoke", variant, bits=16, epochs=1)
    train_into(tmp_path, config, load("emoji"), "cpu", progress=False)
    assert run_example(tmp_path)["codes"].shape == (len(load("emoji").query), 2)


def test_a_network_goes_to_the_hub_and_comes_back(way, tmp_path, monkeypatch):
    "The Hub is a folder here: what is sent arrives, and `from_pretrained` takes it."
    hub = tmp_path / "hub"

    def upload(self, repo_id, folder_path, **options):
        shutil.copytree(folder_path, hub / repo_id)

    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **options: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    network = load_network("model")
    network.push_to_hub("somebody/videos")
    HfApi().upload_folder("somebody/whole", way / "model")
    x = open_set("features").train.frames[:3]
    for name in ("videos", "whole"):
        again = type(network).from_pretrained(hub / "somebody" / name)
        assert torch.equal(again.encode(x), network.encode(x))
    assert run_example(hub / "somebody" / "whole")["codes"].shape[0] == 2


def test_a_bundled_set_and_the_papers_network(way, capsys):
    "No extractor is known, so no video can be encoded; the codes of the set itself can."
    small = dict(m=16, depth=1, decoder_m=16, n_centers=8, epochs=1, bits=20, share=0.1)
    config = train_config("spoken-digits", "smoke", "paper", **small)
    record = train_into("paper", config, open_set("spoken-digits"), "cpu", progress=False)
    assert type(load_network("paper")).__name__ == record.metrics["row"] == "S5VH"
    assert "extract" not in (way / "paper" / "README.md").read_text(encoding="utf-8")
    run("encode paper spoken-digits digits.npz --device cpu")
    run("index digits.npz digits.index")
    run("index digits.npz digits.index")  # another set can follow
    assert (len(index := HashIndex.load("digits.index")), index.bits) == (6000, 20)  # of 24 in the bytes
    np.save("zeros.npy", np.zeros((1, 3), np.uint8))
    run("index zeros.npy other.index --bits 19")
    run("index digits.npz other.index", 2)
    assert "other.index: expected codes of 20 bits, found 19" in capsys.readouterr().err
    capsys.readouterr()
    run("search digits.index new.mp4 --model paper", 2)
    assert f"paper/{EXTRACTION}: expected a file that names the frame extractor" in capsys.readouterr().err


def test_a_stopped_training_continues(way, small, monkeypatch, capsys):
    "It ends with the weights of one that was not stopped."
    run("train features whole --epochs 12 --bits 16 --device cpu")
    epochs, true_epoch = [], training.train_epoch

    def stopped(run, *rest):
        epochs.append(run.epoch)
        if epochs == [*range(12)]:
            raise KeyboardInterrupt
        return true_epoch(run, *rest)

    monkeypatch.setattr(training, "train_epoch", stopped)
    run("train features parts --epochs 12 --bits 16 --device cpu", 130)
    assert [path.name for path in (way / "parts").iterdir()] == ["unfinished.pt"]
    run("train features parts --epochs 14 --bits 16", 2)  # another training
    run("train features parts --epochs 12 --bits 16 --device cpu")
    assert epochs == [*range(12), 10, 11]
    weights = [(way / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1] and not (way / "parts" / "unfinished.pt").exists()
    monkeypatch.setattr(trained, "train", None)  # it is done: nothing is trained
    run("train features parts --epochs 12 --bits 16 --device cpu")
    (way / "parts" / "model.safetensors").unlink()
    run("train features parts --epochs 12 --bits 16 --device cpu", 2)
    assert "model.safetensors: expected the weights, found no such file" in capsys.readouterr().err


def test_a_folder_with_something_else_is_left_alone(way, capsys):
    shutil.copytree(WEIGHTS / "spoken-digits", "released")
    (way / "mine").mkdir()
    (way / "mine" / "README.md").write_text("mine", encoding="utf-8")
    before = {path: path.read_bytes() for path in way.rglob("*") if path.is_file()}
    for line, message in (
        ("train features model --epochs 3 --seed 2", "model: expected an empty folder, or this training"),
        ("train spoken-digits model", "dataset"),
        ("train features released", "released: expected an empty folder"),
        ("train features features", "features: expected an empty folder, or this training, begun or done"),
        ("features videos model --extractor histogram", "model: expected a folder for features"),
        (
            "train features mine",
            "mine: expected an empty folder, or this training, begun or done, found README.md",
        ),
    ):
        run(line, 2)
        assert message in capsys.readouterr().err, line
    assert {path: path.read_bytes() for path in way.rglob("*") if path.is_file()} == before
    gif(way / "videos" / "red" / "more.gif", "red", 3)
    run("features videos features --extractor histogram --frames 4")
    run("train features model --epochs 3", 2)
    assert "which differs in data (fingerprint" in capsys.readouterr().err


def test_two_trainings_in_one_folder_are_refused(way, capsys):
    (way / "held").mkdir()
    with only_run(way / "held"):
        run("train features held --epochs 1", 2)
    assert "held: expected no other run that writes to this folder" in capsys.readouterr().err
    assert not list((way / "held").iterdir())


def test_commands_name_what_is_wrong(way, capsys):
    shutil.copytree("model", "bare")
    (way / "bare" / EXTRACTION).unlink()
    (way / "other.pth").touch()
    shutil.copytree("model", "foreign")
    (way / "foreign" / EXTRACTION).write_text('{"settings": {}}', encoding="utf-8")
    shutil.copytree("features", "others")
    text = (way / "features" / EXTRACTION).read_text(encoding="utf-8")
    (way / "others" / EXTRACTION).write_text(text.replace('"histogram"', '"random"'), encoding="utf-8")
    (way / "text.mp4").write_text("no video", encoding="utf-8")
    (way / "empty.mp4").touch()
    np.save("short.npy", np.zeros((3, 2), np.uint8))
    run("index short.npy short.index")
    shutil.copytree("model", "twin")
    network = load_network("twin")
    with torch.no_grad():
        network.gain += 1
    network.save_pretrained("twin")
    run("encode twin features twin.npz --device cpu")
    search = "search videos.index new.mp4 --model"
    for line, message in (
        (f"{search} bare", "extraction.json: expected a file that names the frame extractor"),
        (f"{search} foreign", "extraction.json: expected a file that names the frame extractor"),
        (f"{search} nowhere", "nowhere/config.json: expected"),
        (f"{search} model --weights none.pth", "none.pth: expected a file of weights, found nothing there"),
        (f"{search} model --weights other.pth", "weights of the extractor: expected standard, which"),
        ("search videos.index new.mp4", "--model: expected the folder of the model"),
        ("search videos.index --id 1 --filmstrip a.png", "--filmstrip: expected a VIDEO"),
        ("search videos.index text.mp4 --model model", "text.mp4: expected a video"),
        ("search videos.index empty.mp4 --model model", "empty.mp4: expected a video, found an empty file"),
        ("search videos.index none.mp4 --model model", "none.mp4: expected a file"),
        (
            "search short.index new.mp4 --model model",
            "index: expected codes of 64 bits, as the model gives, found 16",
        ),
        (
            "search videos.index new.mp4 --model twin",
            f"codes of the model given, whose fingerprint is {network.fingerprint}, found those of",
        ),
        (
            "index twin.npz videos.index",
            f"videos.index: expected codes of the model {network.fingerprint}, as in twin.npz, found",
        ),
        (
            "encode model spoken-digits a.npz",
            "spoken-digits: width of a feature: expected 512, as model takes, found 13",
        ),
        ("encode model others a.npz", "others: expected features by {'extractor': 'histogram'"),
        ("encode model features a.npy", "OUT: expected the name of a file NAME.npz"),
        ("encode features features a.npz", "config.json: expected the configuration of a saved network"),
        ("encode model nowhere a.npz", "dataset: expected one of"),
        ("encode model videos a.npz", "videos: expected manifest.csv"),
        ("train emoji out --variant released", "variant: expected one of paper, plus"),
        ("encode model emoji a.npz", "model: expected a model of pairs, found one of videos"),
        ("encode model emoji a.npz --ray", "--ray: expected a set of videos, found one of pairs"),
        ("search videos.index --caption cat --model model", "query: expected a VIDEO"),
        ("search videos.index --caption cat", "--model: expected the folder of the model"),
        ("train features out --bits 80", "bits: expected at most 67"),
        ("train features out --epochs 0", "epochs"),
    ):
        capsys.readouterr()
        run(line, 2)
        assert message in capsys.readouterr().err, line
    assert not list(way.glob("a.*")) and not list(way.glob("**/*.tmp*"))
