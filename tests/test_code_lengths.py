"Codes whose bits don't fill their bytes: padding is zero everywhere and counts nowhere."

import numpy as np
import pytest
import torch

from s5vh_nb.basics.config import DMMHConfig, S5VHConfig
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.datasets.catalog import load
from s5vh_nb.evidence.runs import encode_and_score
from s5vh_nb.learning import training
from s5vh_nb.models.codes import pack, sign_ste, unpack
from s5vh_nb.models.dmmh import DMMH
from s5vh_nb.models.methods import METHODS, fit_baseline
from s5vh_nb.models.s5vh import S5VH

LENGTHS = (12, 36, 48)


def networks(k):
    "A small network of each paper, with inputs for it."
    yield S5VH(S5VHConfig(d=5, bits=k, m=8, depth=1, decoder_m=8)).eval(), (torch.randn(9, 6, 5),)
    config = DMMHConfig(di=5, dt=7, bits=k, width=8, image_hidden=8, text_hidden=8, cnn_width=2, layers=1)
    yield DMMH(config).eval(), (torch.randn(9, 5), torch.randn(9, 7))


def padding_of(packed, k):
    "The bits after the code, (n, 8*bytes - k)."
    return np.unpackbits(np.asarray(packed), axis=1)[:, k:]


@pytest.mark.parametrize("k", LENGTHS)
def test_networks_have_codes_of_any_length(k, tmp_path):
    torch.manual_seed(k)
    for network, inputs in networks(k):
        codes = network.encode(*inputs)
        assert network.bits == k and codes.shape == (9, -(-k // 8)) and not padding_of(codes, k).any()
        with torch.no_grad():
            assert torch.equal(unpack(codes, k), sign_ste(network.h(*inputs)))
        network.save_pretrained(tmp_path / type(network).__name__)
        again = type(network).from_pretrained(tmp_path / type(network).__name__)
        assert torch.equal(again.encode(*inputs), codes)


@pytest.mark.parametrize("kind, dataset", [("videos", "spoken-digits"), ("pairs", "emoji")])
def test_baselines_have_codes_of_any_length(kind, dataset):
    data = load(dataset)
    for method in METHODS[kind]:
        hasher = fit_baseline(method, data.train, 12, {"videos": "mean", "pairs": "pair"}[kind])
        made = encode_and_score(hasher, data, "cpu")
        codes = made["codes"]["database"]
        assert hasher.bits == 12 and codes.shape[1] == 2 and not padding_of(codes, 12).any()
        pairs = made["arrays"]["within"][0]
        assert pairs.shape == (13,) and pairs[-1] == len(data.query) * len(data.database)


@pytest.mark.parametrize("dataset", ["spoken-digits", "emoji"])
def test_training_takes_any_length(dataset):
    data = load(dataset)
    run = training.train(
        train_config(dataset, "smoke", epochs=1, bits=12), data, device="cpu", progress=False
    )
    made = encode_and_score(run.model, data, "cpu")
    assert made["arrays"]["within"].shape == (2, 13)
    assert not padding_of(made["codes"]["query"], 12).any()


def test_packing_follows_the_layout_of_the_numbers():
    x = torch.randn(36, 10).T  # not contiguous
    assert torch.equal(pack(x), pack(x.contiguous()))
    assert torch.equal(unpack(pack(x), 36), sign_ste(x))
