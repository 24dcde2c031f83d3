"""The comparisons of training, and nanoGPT's model as a peer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attnbook.bench import __main__, decoding, training
from attnbook.bench import nanogpt as nanogpt_model
from attnbook.models import Decoder, DecoderConfig
from attnbook.train.throughput import training_flops
from helpers import complains

SMALL = DecoderConfig(vocab_size=11, context_length=16, width=16, depth=2, num_heads=2)
PEER = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets=None):
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def generate(self, idx, new, top_k):
        return torch.cat([idx, idx.new_zeros(len(idx), new)], 1)
"""


@pytest.fixture
def peer(tmp_path):
    """Write a model.py that has nanoGPT's names."""
    (tmp_path / "model.py").write_text(PEER)
    return tmp_path


def test_nanogpts_model_is_made_in_the_decoders_shape(peer):
    for path in (peer, str(peer / "model.py")):
        found = vars(nanogpt_model.build(path, SMALL).config)
        assert found == {
            "block_size": 16,
            "vocab_size": 11,
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 16,
            "dropout": 0.0,
            "bias": True,
        }


def test_what_is_not_nanogpts_model_is_refused(tmp_path):
    with complains("nanogpt: expected nanoGPT's model.py, or the folder that holds it, got …"):
        nanogpt_model.build(tmp_path, SMALL)
    (tmp_path / "model.py").write_text("GPT = 1")
    with complains("nanogpt: expected a model.py with GPT and GPTConfig, got …"):
        nanogpt_model.build(tmp_path, SMALL)


@pytest.mark.parametrize("half", [True, False])
def test_bfloat16_is_left_out_where_it_is_not_multiplied(half, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(training, "CONFIG", SMALL)
    monkeypatch.setattr(training, "multiplies_fast", lambda dtype: half)
    settings = [line.setting for line in training.suite()]
    assert any("bfloat16" in setting for setting in settings) is half
    assert ("bfloat16 is left out" in capsys.readouterr().out) is not half


@pytest.mark.parametrize("given", [True, False])
def test_lines_against_nanogpt_are_there_where_its_path_is(given, peer, monkeypatch, capsys):
    pytest.importorskip("transformers")
    for module in (training, decoding):
        monkeypatch.setattr(module, "CONFIG", SMALL)
    monkeypatch.setattr(training, "multiplies_fast", lambda dtype: True)
    monkeypatch.setattr(decoding, "NEW", 3)
    lines = [line for name in ("training", "decoding") for line in __main__._lines(name, peer if given else None)]
    found = [line for line in lines if nanogpt_model.NAME in line.peers]
    assert [round(1 / line.goal, 2) for line in found] == ([1.0, 1.15, 8.0] if given else [])
    said = capsys.readouterr().out
    assert ("training: nanoGPT is left out; --nanogpt PATH" in said) is not given
    for line in found:
        line.ours()
        for call in line.peers.values():
            call()


def test_a_step_is_a_step_of_adamw():
    batch = training.batch_of(SMALL, 3)
    torch.manual_seed(0)
    model, twin = Decoder(SMALL), Decoder(SMALL)
    twin.load_state_dict(model.state_dict())
    step = training.step(model, lambda net: training.token_loss(net, batch), autocast=False)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(3):
        step()
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(batch[0]).flatten(0, 1), batch[1].flatten()).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_peers_have_as_many_parameters():
    pytest.importorskip("transformers")
    count = sum(p.numel() for p in decoding.gpt2(SMALL).parameters())
    assert count == SMALL.num_parameters()


def test_products_do_as_many_operations_as_a_step(monkeypatch):
    monkeypatch.setattr(training, "PRODUCT", 64)
    operations = training_flops(Decoder(SMALL), SMALL.context_length) * 48
    with FlopCounterMode(display=False) as counter:
        training.products(operations)()
    assert counter.get_total_flops() == pytest.approx(operations, abs=64**2)


def test_both_loops_train_alike(monkeypatch):
    monkeypatch.setattr(training, "TINY", SMALL)
    losses = {name: call() for name, call in training.loops().items()}
    assert losses["train.fit"] == pytest.approx(losses["a bare loop"], rel=1e-5)
    assert losses["train.fit"][-1] < losses["train.fit"][0]
