"""The same model in simple eager PyTorch, for comparison.

Attention is dense with masks at the token level, and at the byte level too unless it is `blocked`. The token level is padded to
the longest sequence, which needs a host sync. The policy samples byte by byte.
"""

from __future__ import annotations

import gc

import torch  # pyrefly: ignore[missing-import] -- optional dependency of the extra `bench`
import torch.nn.functional as F  # pyrefly: ignore[missing-import] -- the same
from torch import nn  # pyrefly: ignore[missing-import] -- the same

from estimators.sections import PolicySettings
from experiments.benchmark.timing import Work
from experiments.config.settings import RunConfig, transformer_shape


class Norm(nn.Module):
    """RMSNorm with a gain of 1 + weight."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Block(nn.Module):
    """A block as in Gemma 2: attention with a soft cap and GeGLU, each with a norm before and after it."""

    def __init__(self, dim: int, heads: int, hidden: int, cap: float = 50.0):
        super().__init__()
        self.heads, self.cap = heads, cap
        self.norms = nn.ModuleList(Norm(dim) for _ in range(4))
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate_up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | int) -> torch.Tensor:
        """`mask`: True where a query sees a key, or a window, whose attention is then computed in blocks."""
        batch, length, dim = x.shape
        shape = batch, length, self.heads, dim // self.heads
        query, key, value = (
            part.reshape(shape).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        query, key = _rotary(query, cos, sin), _rotary(key, cos, sin)
        if isinstance(mask, int):
            query, key, value, mask = _in_blocks(query, key, value, mask)
        else:
            mask = mask[:, None]
        logits = query @ key.transpose(-1, -2) * shape[-1] ** -0.5
        logits = (self.cap * torch.tanh(logits / self.cap)).masked_fill(~mask, -torch.inf)
        mixed = logits.softmax(-1) @ value
        mixed = (
            mixed.reshape(batch, self.heads, -1, shape[-1])[:, :, :length].transpose(1, 2).reshape(batch, length, dim)
        )
        x = x + self.norms[1](self.out(mixed))
        gate, up = self.gate_up(self.norms[2](x)).chunk(2, dim=-1)
        return x + self.norms[3](self.down(F.gelu(gate, approximate="tanh") * up))


def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`x` with rotary position embedding."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def _in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries in blocks of the size of a window, the keys and values of each block and of the one before it, and which keys a
    query sees."""
    batch, heads, length, dim = query.shape
    blocks = -(-length // window)

    def cut(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, 0, blocks * window - length)).reshape(batch, heads, blocks, window, dim)

    def with_previous(x: torch.Tensor) -> torch.Tensor:
        own = cut(x)
        return torch.cat([F.pad(own, (0, 0, 0, 0, 1, 0))[:, :, :-1], own], dim=3)

    places = torch.arange(blocks * window).reshape(blocks, window)
    distance = places[:, :, None] - torch.cat([places - window, places], dim=1)[:, None, :]
    seen = (distance >= 0) & (distance < window) & (distance <= places[:, :, None])
    return cut(query), with_previous(key), with_previous(value), seen


class TorchUNet(nn.Module):
    """The autoregressive U-Net of `config`, its windowed policy and the score-function loss.

    `at_once`: the policy ignores previous actions, so that sampling the boundaries of a sequence needs no loop. `blocked`:
    attention within a window is computed in blocks, instead of a masked square.
    """

    def __init__(self, config: RunConfig, *, at_once: bool, blocked: bool = False):
        super().__init__()
        unet, self.at_once, self.blocked = transformer_shape(config), at_once, blocked
        self.config, self.unet = config, unet
        dim = unet.dim

        def blocks(layers: int, hidden: int) -> nn.ModuleList:
            return nn.ModuleList(Block(dim, unet.heads, hidden) for _ in range(layers))

        self.embedding = nn.Embedding(256, dim)
        self.encoder, self.decoder = blocks(unet.encoder_layers, dim), blocks(unet.decoder_layers, dim)
        self.main = blocks(unet.main_layers, 4 * dim)
        self.policy = nn.Linear(dim, 1 + _policy(config).window, bias=False)
        nn.init.zeros_(self.policy.weight)
        self.norm, self.early_norm = Norm(dim), Norm(dim)
        self.head, self.early_head = nn.Linear(dim, 256, bias=False), nn.Linear(dim, 256, bias=False)

    def loss(self, text: torch.Tensor) -> torch.Tensor:
        """The training loss of a batch of bytes."""
        length = text.shape[1]
        rate, discount = self.config.rate, getattr(self.config.sections["discount"], "factor", 1.0)
        position = torch.arange(length)
        distance = position[:, None] - position[None, :]
        window = min(self.unet.window, length)
        mask = window if self.blocked else ((distance >= 0) & (distance < window))[None]
        angles = self._angles(position[None])
        hidden = self.embedding(text)
        for block in self.encoder:
            hidden = block(hidden, *angles, mask)
        actions, logits = self._sample(hidden, rate)
        counts = actions.sum(1)
        longest = int(counts.max())
        order = torch.argsort((~actions).int(), dim=1, stable=True)[:, :longest]
        tokens = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()[None]
        angles_of_tokens = self._angles(order)
        for block in self.main:
            tokens = block(tokens, *angles_of_tokens, causal)
        token_of = actions.long().cumsum(1) - 1
        joined = hidden + tokens.gather(1, token_of[..., None].expand_as(hidden))
        for block in self.decoder:
            joined = block(joined, *angles, mask)
        late = self._log_prob(self.head(self.norm(joined)), text)
        early = self._log_prob(self.early_head(self.early_norm(hidden)), text)
        rewards = (late - early).detach()
        discounts = torch.where(distance <= 0, discount ** (-distance).clamp(min=0).float(), 0.0)
        returns = rewards @ discounts.T[: length - 1, : length - 1]
        advantages = returns - returns.mean(0)
        log_prob = F.logsigmoid(torch.where(actions, logits, -logits))[:, :-1]
        policy = -(advantages * log_prob)[:, 1:].mean()
        rate_loss = (torch.sigmoid(logits).mean() - rate).square()
        return -late.mean() - early.mean() + 1e-2 * policy + 1e-2 * rate_loss

    def _sample(self, hidden: torch.Tensor, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Sampled boundaries and the logits of the policy."""
        batch, length, _ = hidden.shape
        projections = self.policy(hidden) / _policy(self.config).scale
        base = projections[..., 0] + torch.logit(torch.tensor(rate))
        uniforms = torch.rand(batch, length)
        if self.at_once:
            return (uniforms < torch.sigmoid(base)) | (torch.arange(length) == 0), base
        previous = torch.zeros(batch, projections.shape[-1] - 1)
        actions, logits = [], []
        for i in range(length):
            logit = base[:, i] + (previous * projections[:, i, 1:]).sum(-1)
            action = (uniforms[:, i] < torch.sigmoid(logit)) | (i == 0)
            previous = torch.cat([action[:, None].float(), previous[:, :-1]], dim=1)[:, : previous.shape[1]]
            actions.append(action)
            logits.append(logit)
        return torch.stack(actions, 1), torch.stack(logits, 1)

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        head = self.unet.dim // self.unet.heads
        angles = positions[..., None].float() * 10_000.0 ** (-torch.arange(0, head, 2).float() / head)
        return angles.cos()[:, None], angles.sin()[:, None]

    def _log_prob(self, logits: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(logits[:, :-1].transpose(1, 2), text[:, 1:], reduction="none")


def _policy(config: RunConfig) -> PolicySettings:
    policy = config.sections["policy"]
    assert isinstance(policy, PolicySettings)
    return policy


def torch_step(config: RunConfig, *, at_once: bool = False, blocked: bool = False, compile: bool = False) -> Work:
    """A training step on random bytes: loss, gradient, gradient clipping, AdamW; with autocast if the run computes in bfloat16.

    The learning rate is 0, which takes as long: the policy keeps the target rate, and so every step its number of tokens.

    It is on PyTorch's default device. `compile`: each block in `torch.compile`, for any number of tokens; the blocks of a level
    share a program.
    """
    torch.manual_seed(config.seed)
    model = TorchUNet(config, at_once=at_once, blocked=blocked)
    settings = config.optimizer
    adamw = torch.optim.AdamW(
        model.parameters(),
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )
    text = torch.randint(0, 256, (config.batch, config.length))
    if compile:
        for block in (*model.encoder, *model.decoder, *model.main):
            block.compile(dynamic=True)

    def work() -> tuple[()]:
        adamw.zero_grad()
        with torch.autocast(text.device.type, torch.bfloat16, enabled=config.unet.compute == "bfloat16"):
            value = model.loss(text)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        adamw.step()
        return finished()

    return work


def use_gpu() -> bool:
    """Make a GPU PyTorch's default device where there is one, with products of float32 in TF32, as XLA's; returns whether there
    is."""
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
        torch.set_float32_matmul_precision("high")
    return torch.cuda.is_available()


def finished() -> tuple[()]:
    """Waits until the default device has done all that it was given."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
    return ()


def forget_peak() -> None:
    """Begin to count `peak_bytes` anew, without what earlier work has left in PyTorch's cache."""
    if torch.get_default_device().type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """The most memory of the GPU that PyTorch's arrays took since `forget_peak`; None without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.get_default_device().type == "cuda" else None
