"The network: released checkpoints, damaged files, sizes."
import warnings

import pytest
import torch

from s5vh_nb.config import S5VHConfig
from s5vh_nb.s5vh import S5VH

D, M, K, DECODER, DEPTH, CLASSES = 40, 32, 16, 24, 2, 7

def mamba(m, d_inner=None, n=16, width=4):
    d_inner, rank = 2*m, -(-m//16)
    return {"A_log": (d_inner, n), "D": (d_inner,), "in_proj.weight": (2*d_inner, m), "out_proj.weight": (m, d_inner),
            "conv1d.weight": (d_inner, 1, width), "conv1d.bias": (d_inner,),
            "x_proj.weight": (rank + 2*n, d_inner), "dt_proj.weight": (d_inner, rank), "dt_proj.bias": (d_inner,)}

def linear(name, out, inp, bias=True): return {f"{name}.weight": (out, inp), **({f"{name}.bias": (out,)} if bias else {})}
def norm(name, m): return {f"{name}.weight": (m,), f"{name}.bias": (m,)}

def stack(part, m, depth):
    shapes = {}
    for i in range(depth):
        block = f"{part}.blocks.{i}"
        shapes |= norm(f"{block}.norm1", m) | norm(f"{block}.norm2", m)
        for direction in ("mamba1", "mamba2"): shapes |= {f"{block}.{direction}.{name}": shape for name, shape in mamba(m).items()}
    return shapes | norm(f"{part}.norm", m)

def released_shapes(d, m, k, decoder, depth, classes):
    "Names and shapes of the public release's model_state_dict."
    return {**linear("encoder.patch_embed", m, d), **stack("encoder", m, depth), **linear("encoder.head", m, m),
            **stack("decoder", decoder, 1), **linear("decoder.head", d, decoder), **linear("encoder_to_decoder", decoder, k, bias=False),
            "mask_token": (1, 1, decoder), **linear("binary", k, m), **norm("ln", k), **linear("classifier", classes, k, bias=False),
            **linear("get_token_probs.0", m, d), **{f"get_token_probs.1.{name}": shape for name, shape in mamba(m).items()},
            **linear("get_token_probs.2", 1, m)}

@pytest.fixture
def state():
    torch.manual_seed(0)
    return {name: torch.randn(shape)*.1 for name, shape in released_shapes(D, M, K, DECODER, DEPTH, CLASSES).items()}

def write(path, state):
    torch.save({"model_state_dict": state, "epoch": 1}, path)
    return path

def test_a_released_checkpoint_of_full_size_is_accounted_for(tmp_path):
    "UCF101 at 64 bits: 9,191,489 parameters in all (measured on the release), each in the network or among the tensors that are reported."
    full = {name: torch.zeros(shape) for name, shape in released_shapes(4096, 256, 64, 192, 6, 101).items()}
    assert sum(tensor.numel() for tensor in full.values()) == 9_191_489
    with pytest.warns(UserWarning) as caught: model = S5VH.load_released(write(tmp_path/"released.pt", full))
    reported = str(caught[0].message).split("not used: ")[1].split(", ")
    assert model.config == S5VHConfig(tied=True)
    assert sum(p.numel() for p in model.parameters()) + sum(full[name].numel() for name in reported) == 9_191_489

def test_a_released_checkpoint_loads_tied_and_names_what_it_leaves(state, tmp_path):
    path = write(tmp_path/"released.pt", state)
    with pytest.warns(UserWarning, match="classifier.weight.*get_token_probs") as caught: model = S5VH.load_released(path)
    assert "mamba2" in str(caught[0].message) and "mamba1" not in str(caught[0].message)
    assert model.config == S5VHConfig(d=D, m=M, bits=K, decoder_m=DECODER, depth=DEPTH, tied=True)
    ours = model.state_dict()
    assert torch.equal(ours["hash.norm.weight"], state["ln.weight"])
    assert torch.equal(ours["decoder.mask_token"], state["mask_token"].flatten())
    assert model.encode(torch.randn(3, 25, D)).shape == (3, K//8)

def test_the_loaded_forward_mixer_is_the_released_one(state, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = S5VH.load_released(write(tmp_path/"released.pt", state))
    named = dict(model.encoder.layers[1].named_parameters())
    matches = [name for name, value in named.items() if torch.equal(value, state["encoder.blocks.1.mamba1.A_log"])]
    assert len(matches) == 1

UNUSED = ("mamba2.", "classifier.", "get_token_probs.")
NEEDED = [name for name in released_shapes(D, M, K, DECODER, DEPTH, CLASSES) if not any(part in name for part in UNUSED)]

@pytest.mark.parametrize("missing", NEEDED)
def test_a_missing_tensor_is_named(state, tmp_path, missing):
    del state[missing]
    path = write(tmp_path/"released.pt", state)
    with pytest.raises(KeyError, match="released.pt.*expected the tensor that becomes"): S5VH.load_released(path)

@pytest.mark.parametrize("extra", ["encoder.blocks.0.mamba3.D", "teacher.weight", "ln2.bias", "module.ln.weight"])
def test_a_tensor_that_the_release_does_not_have_is_reported(state, tmp_path, extra):
    state[extra] = torch.zeros(3)
    with pytest.warns(UserWarning, match=f"not used: .*{extra}"): S5VH.load_released(write(tmp_path/"released.pt", state))

def test_every_tensor_that_is_not_used_is_reported(state, tmp_path):
    with pytest.warns(UserWarning) as caught: S5VH.load_released(write(tmp_path/"released.pt", state))
    assert sorted(str(caught[0].message).split("not used: ")[1].split(", ")) == sorted(set(state) - set(NEEDED))

def test_a_tensor_of_another_shape_is_named(state, tmp_path):
    state["encoder.head.weight"] = torch.zeros(M, M + 1)
    path = write(tmp_path/"released.pt", state)
    with pytest.raises(ValueError, match=r"encoder.head.weight: expected shape \(32, 32\), found \(32, 33\)"): S5VH.load_released(path)

def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt"): S5VH.load_released(tmp_path/"nothing.pt")
    (tmp_path/"text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="text.pt: expected a PyTorch checkpoint"): S5VH.load_released(tmp_path/"text.pt")
    torch.save({"weights": {}}, tmp_path/"other.pt")
    with pytest.raises(KeyError, match="other.pt: expected the key model_state_dict"): S5VH.load_released(tmp_path/"other.pt")

@pytest.fixture
def saved(tmp_path):
    S5VH(S5VHConfig(d=13, bits=16, m=16, depth=1, decoder_m=16)).save_pretrained(tmp_path/"model")
    return tmp_path/"model"

def test_a_saved_model_holds_no_pickle(saved):
    assert sorted(f.suffix for f in saved.iterdir()) == [".json", ".md", ".safetensors"]

def test_a_truncated_model_file_is_named(saved):
    weights = saved/"model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ValueError, match="model.safetensors: expected"): S5VH.from_pretrained(saved)

def test_weights_of_another_network_are_refused(saved):
    "They would leave some of the weights as they were drawn."
    config = saved/"config.json"
    config.write_text(config.read_text().replace('"depth": 1', '"depth": 2'))
    with pytest.raises(ValueError, match="model.safetensors: expected .*the weights of S5VH"): S5VH.from_pretrained(saved)

@pytest.mark.parametrize("found", [torch.zeros(2, 25), torch.zeros(2, 25, 12), torch.zeros(2, 25, 13, 1)])
def test_frames_of_another_shape_are_refused(found):
    model = S5VH(S5VHConfig(d=13, bits=16, m=16, depth=1, decoder_m=16))
    with pytest.raises(ValueError, match=r"frames: expected shape \((b|n), t, 13\)"): model.encode(found)

def test_frames_that_are_not_numbers_or_not_there_are_refused():
    model, x = S5VH(S5VHConfig(d=13, bits=16, m=16, depth=1, decoder_m=16)), torch.randn(3, 25, 13)
    x[1, 4, 2] = torch.nan
    with pytest.raises(ValueError, match="features: expected finite numbers"): model.encode(x)
    with pytest.raises(ValueError, match="features: expected at least one item"): model.encode(x[:0])
    with pytest.raises(ValueError, match="t at least 1"): model.encode(x[:, :0])
