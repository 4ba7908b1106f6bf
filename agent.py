"""Config -> agent: SAC with the auxiliary task and the augmentation chosen by the flags."""

import functools
import os

import torch

from augment import center_crop, random_crop, random_shift
from cody import CoDy, PublishedCoDy
from decoder import Reconstruction
from endings import Refused, out_of_memory
from sac import SAC


def make_agent(config, obs_shape, action_dim, device):
    """The agent for the environment's `obs_shape`, (C, H, W), or (n,) for states.

    Raises `Refused` if its networks do not fit in the device's memory.
    """
    augment = crop = _unchanged
    if config.encoder_type != "identity":
        size = config.image_size
        crop = functools.partial(center_crop, size=size)
        if config.agent != "sac_ae":
            larger = config.pre_transform_image_size > size
            augment = functools.partial(random_crop, size=size) if larger else random_shift
        obs_shape = (obs_shape[0], size, size)

    # float32 means float32 unless the user asks for less; PyTorch's default allows TF32 in convolutions
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
    torch.backends.cudnn.benchmark = not config.deterministic  # input sizes never change
    if config.deterministic and device.type == "cuda":
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") != ":16:8":  # the other value that makes cuBLAS deterministic
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)

    objective = {"dynamics_kl": CoDy, "published": PublishedCoDy}[config.cody_objective]
    make_auxiliary = {
        "cody_sac": lambda latent_dim: objective(config, latent_dim, action_dim),
        "sac_ae": lambda latent_dim: Reconstruction(config, obs_shape, latent_dim),
        "sac": lambda latent_dim: None,
    }[config.agent]
    try:
        return SAC(config, obs_shape, action_dim, make_auxiliary, augment, crop, device)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        sizes = f"--hidden_dim {config.hidden_dim} --num_filters {config.num_filters}"
        raise Refused(f"{sizes}: the networks do not fit in the memory of {device}") from None


def _unchanged(obs, times=1):
    return obs
