"""Causal language models of transformers in sessions; our own networks in the hub's folders. Nothing is fetched."""

import math
import sys

import pytest
import torch
from small_models import CONFIGS, shaken, small_quickstart
from torch.nn import functional

from metamem import Session, UserError
from metamem.adaptation.hugging_face import causal_lm, is_causal_lm, load_adapt, load_causal_lm, load_tokenizer
from metamem.adaptation.opening import open_model
from metamem.adaptation.stream import Bytes, Words

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
PERIOD = "hierarchy.levels.stream.period=8"


def gpt2(**settings):
    sizes = {"vocab_size": 256, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, **settings}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def llama():
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


MODELS = pytest.mark.parametrize("make", [gpt2, llama])


def opened(make, *overrides, name="causal_lm"):
    return causal_lm(make(), load_adapt(CONFIGS / f"adapt/{name}.yaml", [PERIOD, *overrides]))


@pytest.fixture
def tokens():
    return torch.randint(256, (1, 70))


@MODELS
def test_frozen_is_the_model_bit_for_bit(make, tokens, tmp_path):
    make().save_pretrained(tmp_path)
    model, config = load_causal_lm(tmp_path, load_adapt(CONFIGS / "adapt/causal_lm.yaml"))
    original, tokens = make(), tokens[:, :32]
    with torch.no_grad():
        logits = original(tokens[:, :-1]).logits
        assert torch.equal(model(tokens[:, :-1]).y, logits)
    expected = functional.cross_entropy(logits[0], tokens[0, 1:], reduction="none")
    losses = Session(model, config, inner=False).observe(tokens).losses
    assert torch.equal(losses[0, 1:], expected) and float(losses[0, 0]) == pytest.approx(math.log(256))


@MODELS
def test_adapting_moves_what_is_named_by_the_next_token_loss(make, tokens):
    model, config = opened(make)
    before = {name: value.clone() for name, value in model.named_parameters()}
    session = Session(model, config)
    frozen = Session(model, config, inner=False)
    repeated = tokens[:, :8].repeat(1, 12)
    observed = session.observe(repeated)
    assert observed.updates == 12 and observed.refused == ()
    assert observed.losses[:, -8:].mean() < frozen.observe(repeated).losses[:, -8:].mean()
    moved = {name for name, value in session.inner["stream"].fast.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".mlp." in name}
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@MODELS
def test_any_split_of_a_stream_gives_the_same_also_where_the_context_starts_anew(make, tokens):
    """And what it gives is the model's own, on its last tokens, each time the context is full."""
    model, config = opened(make, "context=16", "overlap=4")
    whole = Session(model, config, inner=False).observe(tokens).losses
    session = Session(model, config, inner=False)
    split = torch.cat([session.observe(part).losses for part in tokens.split([1, 14, 1, 1, 30, 23], 1)], 1)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5)
    original, inputs, start = make(), tokens[:, :-1], 0
    while start < 69:
        first = max(0, start - 4)
        context = inputs[:, first : first + 16]
        with torch.no_grad():
            logits = original(context).logits[0, start - first :]
        target = tokens[0, start + 1 : start + 1 + len(logits)]
        expected = functional.cross_entropy(logits, target, reduction="none")
        torch.testing.assert_close(whole[0, start + 1 : start + 1 + len(logits)], expected, rtol=1e-4, atol=1e-5)
        start += len(logits)
    assert session.state["tokens"].shape[1] <= 16


def test_a_saved_session_goes_on_bit_for_bit_and_a_fork_by_itself(tokens, tmp_path):
    model, config = opened(gpt2, "context=24", "overlap=3")
    session = Session(model, config)
    session.observe(tokens[:, :37])
    session.save(tmp_path / "s")
    other = Session(*opened(gpt2, "context=24", "overlap=3"))
    other.load(tmp_path / "s")
    fork = session.fork()
    expected = session.observe(tokens[:, 37:]).losses
    assert torch.equal(other.observe(tokens[:, 37:]).losses, expected)
    assert torch.equal(fork.observe(tokens[:, 37:]).losses, expected)
    changed, _ = opened(gpt2)
    with torch.no_grad():
        changed.lm.transformer.wpe.weight[0, 0] += 1
    with pytest.raises(UserError, match="of another model"):
        Session(changed, config).load(tmp_path / "s")


@MODELS
def test_low_rank_deltas_are_all_that_moves(make, tokens):
    model, config = opened(make, name="low_rank")
    with torch.no_grad():
        assert torch.equal(model(tokens[:, :20]).y, make()(tokens[:, :20]).logits)
    session = Session(model, config)
    assert session.observe(tokens).updates == 8
    moved = session.inner["stream"].fast
    assert moved and all(name.endswith(("0.a", "0.b")) for name in moved)
    assert session.state_bytes < 4 * sum(p.numel() for p in make().parameters()) * 4


def test_what_cannot_be_adapted_is_refused_by_name(tmp_path, monkeypatch):
    adapt = load_adapt(CONFIGS / "adapt/causal_lm.yaml")
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    assert is_causal_lm(tmp_path) and not is_causal_lm(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no causal language model that transformers can load"):
        load_causal_lm(tmp_path, adapt)
    with pytest.raises(UserError, match="vocabulary of 100 has no token for every byte"):
        load_tokenizer(tmp_path, 100)
    with pytest.raises(UserError, match="overlap of 8"):
        opened(gpt2, "context=8", "overlap=8")
    with pytest.raises(UserError, match=r"hierarchy.levels.*clock: 'step' is not for this model"):
        load_adapt(
            CONFIGS / "adapt/causal_lm.yaml",
            ["hierarchy.levels.stream.clock=step", "hierarchy.levels.stream.unroll=null"],
        )
    with pytest.raises(UserError, match="no parameter is in the groups"):
        Session(*opened(gpt2, "hierarchy.groups.mlps.match=nothing.**"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r'transformers is not installed: pip install "metamem-torch\[hf\]"'):
        load_causal_lm(tmp_path, adapt)


def test_a_folder_says_what_is_in_it(tmp_path):
    gpt2().save_pretrained(tmp_path / "lm")
    model, config, tokens = open_model(tmp_path / "lm", None, ["context=16"])
    assert model.context == 16 and isinstance(tokens, Bytes)
    assert tokens("é".encode()).tolist() == [[0xC3, 0xA9]] and tokens(b"").shape == (1, 0)
    with pytest.raises(UserError, match="is for a model of transformers"):
        open_model(tmp_path / "run", CONFIGS / "adapt/causal_lm.yaml", [])
    assert Session(model, config).observe(tokens(b"a short text")).losses.isfinite().all()


def test_words_are_not_cut_by_the_pieces_that_they_come_in():
    text = "naïve café, twice: naïve\ncafé " * 5
    encoded = []
    words = Words(lambda text, add_special_tokens: encoded.append(text) or {"input_ids": [len(text)]})
    data = text.encode()
    found = [words(data[at : at + 3]) for at in range(0, len(data), 3)] + [words(b"", last=True)]
    assert "".join(encoded) == text and int(torch.cat(found, 1).sum()) == len(text)
    assert all(part[0] in " \n" for part in encoded[1:])


def test_our_own_networks_are_saved_and_loaded_as_the_hub_does(tmp_path, capsys):
    from metamem.hub import HubNetwork

    config = small_quickstart()
    model, tokens = shaken(config), torch.randint(256, (1, 20))
    HubNetwork.of(model, config).save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= {"config.json", "model.safetensors"}
    loaded = HubNetwork.from_pretrained(str(tmp_path / "saved"), local_files_only=True)
    assert loaded.config == config
    with torch.no_grad():
        assert torch.equal(loaded.network(tokens).y, model(tokens).y)
        assert torch.equal(loaded(tokens).y, model(tokens).y)
    network, run, _ = open_model(tmp_path / "saved", None, [])
    assert torch.equal(Session(network, run).observe(tokens).losses, Session(model, config).observe(tokens).losses)
