"""Dynamic chunking by the package h-net-dynamic-chunking, which `pip install 'caesura-lm[bench]'` installs."""

from __future__ import annotations

import numpy as np
import torch  # pyrefly: ignore[missing-import] -- of the extra `bench`, which no checker needs
from h_net_dynamic_chunking import DynamicSequenceChunker  # pyrefly: ignore[missing-import] -- the same
from jaxtyping import Float

from experiments.benchmark.timing import Work


class Twice(torch.nn.Module):
    """Rows as queries and as keys."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat((rows, rows), dim=-1)


def torch_chunking(hidden: Float[np.ndarray, "batch length dim"], rate: float, *, projected: bool) -> Work:
    """Down, up and the ratio loss, with their gradients, of rows that stay nearly the same but where a token ends.

    Its two projections start as the identity, as this library's do; without `projected` it has none.
    """
    dim = hidden.shape[-1]
    module = DynamicSequenceChunker(dim, target_avg_token_length=1 / rate)
    if projected:
        with torch.no_grad():
            module.to_queries_keys.weight.copy_(torch.eye(dim).repeat(2, 1))
    else:
        module.to_queries_keys = Twice()
    rows = torch.tensor(hidden, requires_grad=True)

    def work() -> tuple[()]:
        module.zero_grad()
        rows.grad = None
        tokens, up, ratio_loss = module(rows)
        (torch.mean(up(tokens) * rows) + ratio_loss).backward()
        return ()

    return work
