"""What each change of the fast path gives by itself: the plain way beside ours, paired in one process.

    python benchmarks/changes.py
    python benchmarks/changes.py --batch_size 256

Each line times one operation as plain.py does it and as the project does it, alternating, and prints the medians,
how often the operation is in one default update, and what that saves. The first lines are the limits: matmul rate
and memory bandwidth. docs/performance.md reads the table.
"""

import copy
import dataclasses
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import plain  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from throughput import DTYPES, matmul_peak  # noqa: E402

from agent import make_agent  # noqa: E402
from augment import random_shift  # noqa: E402
from config import ConfigError, exit_with, parse, parse_flags  # noqa: E402
from utils import Linear, keep_freed_memory, seed_everything, soft_update  # noqa: E402

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Args:
    """What each change gives by itself, on CPU."""

    batch_size: int = 128
    """Images in a batch."""
    repeats: int = 9
    """Pairs of measurements."""


def pair(first, second, repeats):
    """Median milliseconds of two functions, called in turn."""
    times = ([], [])
    for i in range(repeats + 2):
        for function, taken in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            if i >= 2:
                taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def changes(B):
    """Name -> (plain way, our way, times per update of a default agent)."""
    config = parse(["--batch_size", str(B)])
    agent, reference = make_agent(config, (9, 84, 84), 1, CPU), plain.PlainAgent(9, 84, 1, 8, CPU)
    pixels = torch.randint(0, 256, (B, 9, 84, 84), dtype=torch.uint8)
    stored = pixels.transpose(2, 3).contiguous().transpose(2, 3)  # as the replay lays it out
    last = pixels.contiguous(memory_format=torch.channels_last)  # as the augmentation returns it
    floats = pixels.float()
    h = torch.relu(torch.randn(B, 32, 35, 35)).contiguous(memory_format=torch.channels_last)
    hidden = torch.randn(B, config.hidden_dim, requires_grad=True)
    flat = h.permute(0, 2, 3, 1).flatten(1).requires_grad_()
    convs, plain_convs = agent.encoder.convs, reference.critic.encoder.convs

    def plain_stack():
        h = floats / 255
        for conv in plain_convs:
            h = torch.relu(conv(h))
        return h.flatten(1)

    def forward(stack):
        def call():
            with torch.no_grad():
                stack()

        return call

    def backward(stack, parameters):
        gradient = torch.randn_like(stack())

        def call():
            torch.autograd.grad(stack(), parameters, gradient)

        return call

    def linear(kind, x, outputs):
        layer = kind(x.shape[1], outputs)
        leaves, gradient = [x, *layer.parameters()], torch.randn(B, outputs)
        return lambda: torch.autograd.grad(layer(x), leaves, gradient)

    def shift_plain():
        padded = F.pad(floats, (4, 4, 4, 4), mode="replicate")
        corners = torch.randint(0, 9, (B, 2)).tolist()
        torch.stack([x[:, i : i + 84, j : j + 84] for x, (i, j) in zip(padded, corners, strict=True)])

    gradients = [torch.randn_like(p) for p in agent.encoder.parameters()]
    theirs, ours = copy.deepcopy(agent.encoder), copy.deepcopy(agent.encoder)
    for encoder in (theirs, ours):
        for p, gradient in zip(encoder.parameters(), gradients, strict=True):
            p.grad = gradient.clone()
    two = [torch.optim.Adam(theirs.parameters(), lr) for lr in (1e-3, 1e-4)]
    one = torch.optim.Adam(ours.parameters(), 1.1e-3, fused=True)
    weights = list(convs.parameters())
    return {
        "random shift": (shift_plain, lambda: random_shift(stored), 3),
        "pixels to scaled floats": (lambda: pixels.float() / 255, lambda: last.float(), 5.5),
        "convolutions, forward": (forward(plain_stack), forward(lambda: convs(last)), 5.5),
        "the same in bf16": (forward(plain_stack), forward(bf16_of(convs, last)), 5.5),
        "convolutions, forward and backward": (
            backward(plain_stack, list(plain_convs.parameters())),
            backward(lambda: convs(last), weights),
            2,
        ),
        "the same in bf16 ": (
            backward(plain_stack, list(plain_convs.parameters())),
            backward(bf16_of(convs, last), weights),
            2,
        ),
        "flatten to the head": (lambda: h.flatten(1), lambda: h.permute(0, 2, 3, 1).flatten(1), 5.5),
        "head, forward and backward": (
            linear(torch.nn.Linear, flat, config.encoder_feature_dim),
            linear(Linear, flat, config.encoder_feature_dim),
            2.5,
        ),
        "hidden layer, forward and backward": (
            linear(torch.nn.Linear, hidden, config.hidden_dim),
            linear(Linear, hidden, config.hidden_dim),
            5,
        ),
        "encoder's Adam in the CoDy step": (lambda: [o.step() for o in two], one.step, 1),
        "EMA of the encoder": (
            lambda: plain.PlainAgent.soft_update(agent.encoder, theirs, 0.05),
            lambda: soft_update(agent.encoder, agent.target_encoder, 0.05),
            0.5,
        ),
    }


def bf16_of(convs, obs):
    """The same convolutions in bfloat16."""
    twin = copy.copy(convs)
    twin.dtype = torch.bfloat16
    return lambda: twin(obs)


def main():
    try:
        args = parse_flags(Args)
        if args.batch_size < 1 or args.repeats < 1:
            raise ConfigError("--batch_size and --repeats: must be at least 1")
    except ConfigError as error:
        exit_with(error)
    keep_freed_memory()
    seed_everything(0)
    for name, dtype in DTYPES.items():
        print(f"matmul {name}: {matmul_peak(dtype, CPU) / 1e9:.0f} GFLOP/s")
    block, copied = torch.zeros(2, 64 * 2**20)
    ms, _ = pair(lambda: copied.copy_(block), lambda: None, args.repeats)
    print(f"memory: {2 * block.nbytes / ms / 1e6:.1f} GB/s read and written in a copy\n")
    print(
        f"{'batch ' + str(args.batch_size):36} {'plain ms':>9} {'ours ms':>9} {'ratio':>6} {'per update':>11}"
        f" {'saves ms':>9}"
    )
    for name, (first, second, count) in changes(args.batch_size).items():
        theirs, ours = pair(first, second, args.repeats)
        print(
            f"{name:36} {theirs:9.2f} {ours:9.2f} {theirs / ours:6.1f} {count:11} {count * (theirs - ours):9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
