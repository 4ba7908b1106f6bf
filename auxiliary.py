"""The interface between SAC and the auxiliary task that trains its encoder."""

from torch import nn


class AuxiliaryTask(nn.Module):
    """A second loss that trains the encoder, with networks of its own and a step of its own.

    Subclasses define
        loss(batch, z, encoder, target_encoder, detailed) -> (loss, metrics), where z = encoder(batch.obs) with gradient
    `lr` is the learning rate of the task's own parameters, `encoder_lr` the encoder's in the task's step.
    """

    augmented = {}  # {another augmented field of Batch: the field with its images}, besides `obs` and `next_obs`
    update_freq = 1  # updates between the task's steps
    weight_decay, beta2 = 0, 0.999  # of Adam
    warmup_updates = 0  # updates of linear warm-up of the step's size
    max_grad_norm = None  # norm at which the loss's gradient is clipped
    grad_ratio = None  # joint mode: norm of the loss's gradient at the latent, relative to the critic's

    def __init__(self, config, lr, encoder_lr):
        super().__init__()
        self.config, self.lr, self.encoder_lr = config, lr, encoder_lr

    def update_targets(self):
        """EMA step of the task's own target networks."""

    def images(self, batch, encoder):
        """Images for TensorBoard: {name: (N, 3, H, W)}."""
        return {}
