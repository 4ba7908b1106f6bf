"""The plainest way of writing the update, with none of the project's code, gives the same losses."""

import pytest
import torch
from plain import PlainAgent


def channels_first(weight):
    """Columns of a head on conv features (4 filters, 7 x 7): ours (H, W, C) -> the plain order (C, H, W)."""
    return weight.unflatten(1, (3, 3, 4)).permute(0, 3, 1, 2).flatten(1)


def copy_into(plain, agent):
    """Give the plain agent the weights of ours."""

    def load(module, ours):
        module.load_state_dict(ours.state_dict())

    for critic, encoder, q in (
        (plain.critic, agent.encoder, agent.critic),
        (plain.critic_target, agent.target_encoder, agent.target_critic),
    ):
        load(critic.encoder.convs, encoder.convs.layers)
        load(critic.encoder.ln, encoder.head.ln)
        load(critic.Q1, q.Q1)
        load(critic.Q2, q.Q2)
    load(plain.actor.encoder.ln, agent.actor.head.ln)
    load(plain.actor.trunk, agent.actor.trunk)
    for theirs, head in (
        (plain.critic.encoder.fc, agent.encoder.head.fc),
        (plain.critic_target.encoder.fc, agent.target_encoder.head.fc),
        (plain.actor.encoder.fc, agent.actor.head.fc),
    ):
        theirs.weight.data.copy_(channels_first(head.weight.data))
        theirs.bias.data.copy_(head.bias.data)
    for name in ("posterior", "prior", "projection", "predictor"):
        load(getattr(plain, name), getattr(agent.auxiliary, name))
    load(plain.predictor_target, agent.auxiliary.target_predictor)
    plain.W.data.copy_(agent.auxiliary.W.data)


@pytest.mark.parametrize("target, critic", [(1, 1), (2, 3)])
def test_updates_agree(small_agent, random_batch, target, critic):
    """Losses of the first three updates; later ones differ by rounding that Adam's first steps amplify.

    The plain loop over augmentations draws the same noise piece by piece, which holds for multiples of 16 numbers.
    """
    agent = small_agent(f"--num_layers 4 --target_augmentations {target} --critic_augmentations {critic}")
    batch = agent.augment(random_batch(16))
    assert len(batch.next_obs) == 16 * target and len(batch.obs) == 16 * critic
    plain = PlainAgent(9, 20, 2, 4, "cpu", filters=4, latent_dim=8, hidden=32)
    copy_into(plain, agent)
    floats = [value.float() for value in batch[:7]]
    floats[2], floats[5] = floats[2].split(16), floats[5].split(16)
    for index in range(3):
        torch.manual_seed(index)
        ours = agent.update(batch, index)
        torch.manual_seed(index)
        theirs = plain.update(floats, index)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value.detach(), rtol=1e-3, atol=1e-5, msg=f"{name} {index}")
    torch.testing.assert_close(plain.critic.Q1[0].weight, agent.critic.Q1[0].weight, rtol=0, atol=2e-4)
    torch.testing.assert_close(plain.W, agent.auxiliary.W, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        plain.critic_target.encoder.fc.weight, channels_first(agent.target_encoder.head.fc.weight), rtol=0, atol=2e-4
    )
