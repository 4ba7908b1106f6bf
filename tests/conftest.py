"""Shared by the tests: small agents and random batches."""

import pytest
import torch

from agent import make_agent
from config import parse
from replay_buffer import Batch

SMALL = "--encoder_feature_dim 8 --hidden_dim 32 --num_filters 4 --image_size 20 --num_layers 2 --action_repeat 4"


@pytest.fixture
def small_agent():
    """Factory: flags -> agent with small networks and two actions."""

    def make(flags="", seed=0, obs_shape=(9, 20, 20)):
        torch.manual_seed(seed)
        return make_agent(parse(f"{SMALL} {flags}".split()), obs_shape, 2, torch.device("cpu"))

    return make


@pytest.fixture
def random_batch():
    """Factory: B -> `Batch` of noise for `small_agent`."""

    def make(n=16, seed=0):
        g = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (3, n, 9, 20, 20), dtype=torch.uint8, generator=g)
        actions = torch.rand(2, n, 2, generator=g) * 2 - 1
        reward = torch.rand(n, 1, generator=g)
        not_done = torch.ones(n, 1)
        return Batch(images[0], actions[0], images[1], actions[1], reward, images[2], not_done)

    return make
