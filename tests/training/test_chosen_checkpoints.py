"""Checkpoints of networks whose posteriors were chosen: from an architecture, and of one's own."""
import pytest
import torch
from torch import nn

from symbnn.errors import Refusal
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.moped import moped
from symbnn.posterior.sampling import sample_weights
from symbnn.training.architectures import Architecture, build
from symbnn.training.checkpoints import load_network, load_tensors, read_checkpoint, save_network

CHOICES = {
    "chosen names": {"only": ["1.weight", "3.*"]}, "skipped": {"skip": "*.bias"},
    "by the tensor": {"only": "*", **moped(0.2, 0.5)},
}


@pytest.mark.parametrize("name", CHOICES)
def test_networks_with_chosen_posteriors_come_back(tmp_path, name):
    its = Architecture("mlp", (1, 4, 4), classes=3, channels=(5,))
    network = with_posteriors(build(its, torch.Generator().manual_seed(0)), **CHOICES[name])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    save_network(tmp_path, network, its)
    again = load_network(tmp_path)
    assert list(variational_tensors(again)) == list(variational_tensors(network))
    before, after = network.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())


def test_networks_of_ones_own_come_back_by_their_tensors(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(10, 4), nn.LSTM(4, 3), nn.LayerNorm(3))
    network, other = (with_posteriors(plain, only="*", scale=scale) for scale in (0.1, 0.3))
    save_network(tmp_path, network, None)
    with pytest.raises(Refusal, match=r"load_tensors\(network") as found:
        load_network(tmp_path)
    exec(found.value.fix.partition(", on a")[0], {"load_tensors": load_tensors, "network": other,
                                                  "read_checkpoint": read_checkpoint, "folder": tmp_path})
    weights = [sample_weights(q, 2, torch.Generator().manual_seed(0)) for q in (network, other)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    with pytest.raises(Refusal, match=r"without 0\.weight\.posterior"):
        load_tensors(with_posteriors(plain, only="0.*"), {
            key: value for key, value in network.state_dict().items() if not key.startswith("0.weight")})
