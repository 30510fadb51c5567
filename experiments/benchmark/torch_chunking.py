"""Dynamic chunking with the package h-net-dynamic-chunking, from `pip install 'caesura-lm[bench]'`."""

from __future__ import annotations

import numpy as np
import torch  # pyrefly: ignore[missing-import] -- optional dependency of the extra `bench`
from h_net_dynamic_chunking import DynamicSequenceChunker  # pyrefly: ignore[missing-import] -- the same
from jaxtyping import Float

from experiments.benchmark.timing import Work
from experiments.benchmark.torch_unet import finished


class HiddenAsQueriesAndKeys(torch.nn.Module):
    """Uses the hidden states as queries and as keys, without projections."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.cat((hidden_states, hidden_states), dim=-1)


def torch_chunking(hidden: Float[np.ndarray, "batch length dim"], rate: float, *, projected: bool) -> Work:
    """Downsampling, upsampling and the ratio loss, with their gradients, on PyTorch's default device.

    `projected`: whether queries and keys have projections, which start as the identity as in this library.
    """
    dim = hidden.shape[-1]
    module = DynamicSequenceChunker(dim, target_avg_token_length=1 / rate)
    if projected:
        with torch.no_grad():
            module.to_queries_keys.weight.copy_(torch.eye(dim).repeat(2, 1))
    else:
        module.to_queries_keys = HiddenAsQueriesAndKeys()
    hidden_states = torch.tensor(hidden, requires_grad=True, device=torch.get_default_device())

    def work() -> tuple[()]:
        module.zero_grad()
        hidden_states.grad = None
        tokens, up, ratio_loss = module(hidden_states)
        (torch.mean(up(tokens) * hidden_states) + ratio_loss).backward()
        return finished()

    return work
