"The network: released checkpoints, damaged files, sizes."

import math
import warnings

import pytest
import torch

from s5vh_nb.basics.config import S5VHConfig, replace
from s5vh_nb.models.codes import sign_ste, unpack
from s5vh_nb.models.mixers import MIXERS
from s5vh_nb.models.s5vh import S5VH, positions

SIZES = dict(d=40, m=32, k=16, decoder=24, depth=2, classes=7)  # of a small checkpoint
SMALL = S5VHConfig(d=13, bits=16, m=16, depth=1, decoder_m=16)


def mamba(m, n=16, width=4):
    d_inner, rank = 2 * m, math.ceil(m / 16)
    return {
        "A_log": (d_inner, n),
        "D": (d_inner,),
        "in_proj.weight": (2 * d_inner, m),
        "out_proj.weight": (m, d_inner),
        "conv1d.weight": (d_inner, 1, width),
        "conv1d.bias": (d_inner,),
        "x_proj.weight": (rank + 2 * n, d_inner),
        "dt_proj.weight": (d_inner, rank),
        "dt_proj.bias": (d_inner,),
    }


def linear(name, out, inp, bias=True):
    return {f"{name}.weight": (out, inp), **({f"{name}.bias": (out,)} if bias else {})}


def norm(name, m):
    return {f"{name}.weight": (m,), f"{name}.bias": (m,)}


def stack(part, m, depth):
    shapes = {}
    for i in range(depth):
        block = f"{part}.blocks.{i}"
        shapes |= norm(f"{block}.norm1", m) | norm(f"{block}.norm2", m)
        for direction in ("mamba1", "mamba2"):
            shapes |= {f"{block}.{direction}.{name}": shape for name, shape in mamba(m).items()}
    return shapes | norm(f"{part}.norm", m)


def released_shapes(d, m, k, decoder, depth, classes):
    "Names and shapes of the public release's model_state_dict."
    return {
        **linear("encoder.patch_embed", m, d),
        **stack("encoder", m, depth),
        **linear("encoder.head", m, m),
        **stack("decoder", decoder, 1),
        **linear("decoder.head", d, decoder),
        **linear("encoder_to_decoder", decoder, k, bias=False),
        "mask_token": (1, 1, decoder),
        **linear("binary", k, m),
        **norm("ln", k),
        **linear("classifier", classes, k, bias=False),
        **linear("get_token_probs.0", m, d),
        **{f"get_token_probs.1.{name}": shape for name, shape in mamba(m).items()},
        **linear("get_token_probs.2", 1, m),
    }


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {name: torch.randn(shape) * 0.1 for name, shape in released_shapes(**SIZES).items()}


def write(path, state):
    torch.save({"model_state_dict": state, "epoch": 1}, path)
    return path


def load_with_warning(path, match="not used: "):
    "The network, and the names of the tensors that the warning reports."
    with pytest.warns(UserWarning, match=match) as caught:
        model = S5VH.load_released(path)
    return model, str(caught[0].message).split("not used: ")[1].split(", ")


def test_a_released_checkpoint_of_full_size_is_accounted_for(tmp_path):
    """UCF101 at 64 bits has 9,191,489 parameters (measured on the release).

    Each is in the network or among the tensors that are reported.
    """
    shapes = released_shapes(4096, 256, 64, 192, 6, 101)
    full = {name: torch.zeros(shape) for name, shape in shapes.items()}
    assert sum(tensor.numel() for tensor in full.values()) == 9_191_489
    model, reported = load_with_warning(write(tmp_path / "released.pt", full))
    assert model.config == S5VHConfig(tied=True)
    unused = sum(full[name].numel() for name in reported)
    assert sum(p.numel() for p in model.parameters()) + unused == 9_191_489


def test_a_released_checkpoint_loads_tied_and_names_what_it_leaves(state, tmp_path):
    path = write(tmp_path / "released.pt", state)
    model, reported = load_with_warning(path, "classifier.weight.*get_token_probs")
    assert any("mamba2" in name for name in reported) and not any("mamba1" in name for name in reported)
    assert model.config == S5VHConfig(d=40, m=32, bits=16, decoder_m=24, depth=2, tied=True)
    ours = model.state_dict()
    assert torch.equal(ours["hash.norm.weight"], state["ln.weight"])
    assert torch.equal(ours["decoder.mask_token"], state["mask_token"].flatten())
    assert model.encode(torch.randn(3, 25, 40)).shape == (3, 2)


def test_the_loaded_forward_mixer_is_the_released_one(state, tmp_path):
    model, _ = load_with_warning(write(tmp_path / "released.pt", state))
    named, released = dict(model.encoder.layers[1].named_parameters()), "encoder.blocks.1.mamba1.A_log"
    assert sum(torch.equal(value, state[released]) for value in named.values()) == 1


UNUSED = ("mamba2.", "classifier.", "get_token_probs.")
NEEDED = [name for name in released_shapes(**SIZES) if not any(part in name for part in UNUSED)]


@pytest.mark.parametrize("missing", NEEDED)
def test_a_missing_tensor_is_named(state, tmp_path, missing):
    del state[missing]
    path = write(tmp_path / "released.pt", state)
    with pytest.raises(KeyError, match="released.pt.*expected the tensor that becomes"):
        S5VH.load_released(path)


EXTRA = ["encoder.blocks.0.mamba3.D", "teacher.weight", "ln2.bias", "module.ln.weight"]


@pytest.mark.parametrize("extra", EXTRA)
def test_a_tensor_that_the_release_does_not_have_is_reported(state, tmp_path, extra):
    state[extra] = torch.zeros(3)
    load_with_warning(write(tmp_path / "released.pt", state), f"not used: .*{extra}")


def test_every_tensor_that_is_not_used_is_reported(state, tmp_path):
    _, reported = load_with_warning(write(tmp_path / "released.pt", state))
    assert sorted(reported) == sorted(set(state) - set(NEEDED))


def test_a_tensor_of_another_shape_is_named(state, tmp_path):
    state["encoder.head.weight"] = torch.zeros(32, 33)
    path = write(tmp_path / "released.pt", state)
    message = r"encoder.head.weight: expected shape \(32, 32\), found \(32, 33\)"
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        S5VH.load_released(path)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        S5VH.load_released(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint", encoding="utf-8")
    with pytest.raises(ValueError, match="text.pt: expected a PyTorch checkpoint"):
        S5VH.load_released(tmp_path / "text.pt")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    with pytest.raises(KeyError, match="other.pt: expected the key model_state_dict"):
        S5VH.load_released(tmp_path / "other.pt")


@pytest.fixture
def saved(tmp_path):
    S5VH(SMALL).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_holds_no_pickle(saved):
    assert sorted(f.suffix for f in saved.iterdir()) == [".json", ".md", ".safetensors"]


def test_a_truncated_model_file_is_named(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ValueError, match="model.safetensors: expected"):
        S5VH.from_pretrained(saved)


def test_weights_of_another_network_are_refused(saved):
    "They would leave some of the weights as they were drawn."
    config = saved / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"depth": 1', '"depth": 2'), encoding="utf-8")
    with pytest.raises(ValueError, match="model.safetensors: expected .*the weights of S5VH"):
        S5VH.from_pretrained(saved)


def test_a_code_is_the_vote_of_the_frames():
    torch.manual_seed(0)
    model, x = S5VH(SMALL).eval(), torch.randn(6, 25, 13)
    codes = model(x).codes  # (n, t, k) of -1 and +1; with 25 frames no vote is a tie
    votes = (codes > 0).sum(1) * 2 > codes.shape[1]
    assert torch.equal(unpack(model.encode(x)), sign_ste(codes.mean(1)))
    assert torch.equal(unpack(model.encode(x)) > 0, votes)


@pytest.mark.parametrize("shape", [(2, 25), (2, 25, 12), (2, 25, 13, 1), (2, 0, 13)])
def test_frames_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"frames: expected shape \(n, t, 13\), t at least 1"):
        S5VH(SMALL).encode(torch.zeros(shape))


def test_frames_that_are_not_numbers_or_missing_are_refused():
    model, x = S5VH(SMALL), torch.randn(3, 25, 13)
    x[1, 4, 2] = torch.nan
    with pytest.raises(ValueError, match="features, projected: expected finite numbers"):
        model.encode(x)
    with pytest.raises(ValueError, match="features: expected at least one item"):
        model.encode(x[:0])
    with pytest.raises(ValueError, match="t at least 1"):
        model.encode(x[:, :0])


def test_positions_follow_the_default_dtype():
    "They are kept between calls, but not from one dtype to another."
    for dtype in (torch.float32, torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            assert positions(6, 16).dtype == dtype
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
def test_frames_go_from_layer_to_layer_in_float32_under_autocast(features):
    "On a GPU only layers on float32 are one step; features that training keeps in bfloat16 change nothing."
    model, seen = S5VH(S5VHConfig(d=4, m=8, depth=2, decoder_m=4, bits=8)), []
    model.encoder.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    model.decoder.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    visible = torch.tensor([[0, 2], [1, 2]])
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 4, 4, dtype=features), visible)
        model.decoder(out.codes, visible, out.hidden)
    assert seen == [torch.float32] * 2
    model.bfloat16()
    model(torch.randn(2, 4, 4, dtype=torch.bfloat16))
    assert seen[2:] == [torch.bfloat16]


@pytest.mark.parametrize("mixer", MIXERS)
def test_first_weights_of_the_release(mixer):
    "Xavier and no bias in all layers, mixers included; hash layer and decoder input keep torch's own start."
    config = S5VHConfig(d=13, bits=32, m=64, depth=2, decoder_m=64, mixer=mixer, start="released")
    net = S5VH(replace(config, directions="forward") if mixer == "Transformer" else config)
    kept = net.hash.linear, net.decoder.embed
    for name, linear in net.named_modules():
        if not isinstance(linear, torch.nn.Linear):
            continue
        rows, columns = linear.weight.shape
        limit = columns**-0.5 if linear in kept else math.sqrt(6 / (rows + columns))
        assert 0.9 * limit < linear.weight.abs().max() <= limit, name
        if linear.bias is not None:
            assert linear.bias.any() == (linear in kept), name
