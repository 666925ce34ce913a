"""Transformers of Hugging Face, built small from their settings."""

import pytest
import torch
from torch import nn

from helpers_symmetry import random, randomised
from symbnn.errors import Refusal
from symbnn.symmetry.actions import Action, natural_action
from symbnn.symmetry.fields import field, flips, rotations
from symbnn.symmetry.groups import Cyclic, Permutations
from symbnn.symmetry.networks import intertwining_error, network_action
from tolerances import exact32, exact64

pytest.importorskip("transformers")
try:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, ViTConfig, ViTModel
except (ImportError, RuntimeError) as error:  # as with a torchvision for another torch
    pytest.skip(f"transformers does not import here: {error}", allow_module_level=True)

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


class Last(nn.Module):
    """The last hidden states, from one argument."""

    def __init__(self, model, argument):
        super().__init__()
        self.model, self.argument = model, argument

    def forward(self, x):
        return self.model(**{self.argument: x}).last_hidden_state


def bert(kind):
    config = BertConfig(vocab_size=11, max_position_embeddings=7, attn_implementation=kind, **SMALL)
    return Last(BertModel(config, add_pooling_layer=False), "input_ids")


def vit(kind):
    config = ViTConfig(image_size=8, patch_size=2, num_channels=3, attn_implementation=kind, **SMALL)
    return Last(ViTModel(config, add_pooling_layer=False), "pixel_values")


def gpt2(kind):
    config = GPT2Config(
        vocab_size=11,
        n_positions=7,
        n_embd=8,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=kind,
    )
    return Last(GPT2Model(config), "input_ids")


TOKENS = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(0))
STILL, ORDER = Action.trivial(Cyclic(2), (7,)), natural_action(Permutations(7))
CELLS = {  # model and group -> maker, action, words of the refusal
    ("BERT", "trivial"): (bert, STILL, ""),
    ("BERT", "permutations"): (bert, ORDER, "embeddings: add.*stays beside one that is moved"),
    ("GPT-2", "trivial"): (gpt2, STILL, ""),
    ("GPT-2", "permutations"): (gpt2, ORDER, "a mask, an encoding or weights that prefer some positions"),
    ("ViT", "quarter turns"): (vit, field(rotations(), (3, 8, 8)), ""),
    ("ViT", "left-right flips"): (vit, field(flips(), (3, 8, 8)), ""),
}


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CELLS, ids=", ".join)
def test_it_is_exact_or_refused(name, kind):
    make, action, words = CELLS[name]
    network = randomised(make(kind)).eval()
    tokens = TOKENS if action.shape == (7,) else None
    if words:
        with pytest.raises(Refusal, match=words):
            network_action(network, action, example=tokens)
        return
    found, x = network_action(network, action, example=tokens), random(3, *action.shape) if tokens is None else tokens
    assert network(x).std() > 0.05
    # written out, the softmax of these models is in float32
    assert intertwining_error(network, found, x) <= (exact64 if kind == "sdpa" else exact32)
