"""Config -> agent: SAC with the auxiliary task and the augmentation that the flags name."""

import functools

from augment import center_crop, random_crop, random_shift
from cody import CoDy
from sac import SAC


def make_agent(config, frame_channels, action_dim, device):
    """The agent on `device`, for observations of `frame_stack` frames of `frame_channels` channels each."""
    size = config.image_size
    augment = random_shift
    if config.pre_transform_image_size > size:
        augment = functools.partial(random_crop, size=size)
    return SAC(
        config,
        obs_shape=(frame_channels * config.frame_stack, size, size),
        action_dim=action_dim,
        auxiliary=CoDy(config, action_dim),
        augment=augment,
        crop=functools.partial(center_crop, size=size),
        device=device,
    )
