"""Shapes of H-Nets: nested hierarchies of Mamba-2 and transformer layers.

"H-Net" is Hwang, Wang and Gu, "Dynamic chunking for end-to-end hierarchical sequence modeling".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from estimators.base import VOCAB, AbstractEstimator
from estimators.bounds import Positive, Weight, Width, Within, shown
from estimators.keys import named_key
from unet.attention import Attention
from unet.blocks import PreNorm, Stack, attending
from unet.config import AbstractShape, Parts
from unet.experts import Experts
from unet.hierarchy import AbstractStage, Flat, Hierarchy
from unet.layers import Linear, ScaleNorm, SwiGLU
from unet.mamba import HEAD, Mamba2
from unet.widened import Widened

STD = 0.02
"""Standard deviation of initial weights, as released."""


MAX_LAYERS = 4096
"""Most layers of one network, so that a mistyped layout does not fill the memory."""
MAX_STAGES = 16
"""Most stages, one inside another."""


@dataclass(frozen=True)
class Networks:
    """The layers of one stage: those of the `encoder` and the `decoder` around the stage `inside`, or at the innermost stage
    those of the `main` network. A layer is one of the letters mMtT (see `read_layout`)."""

    encoder: str = ""
    inside: Networks | None = None
    decoder: str = ""
    main: str = ""

    @property
    def depth(self) -> int:
        """Number of token levels inside."""
        return 0 if self.inside is None else 1 + self.inside.depth


def read_layout(text: str) -> Networks:
    """Parse a published layout, such as `["m4", ["T1m4", ["T26"], "m4T1"], "m4"]`.

    m: a Mamba-2 layer, t: attention; M and T: with an MLP; a network without layers is only a norm. A list of three parts is
    encoder, main network and decoder, the main network being a list again; a list of one part is the main network alone. Raises
    `ValueError` for anything else.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a layout must be a JSON list; got {shown(text)} ({str(error)[:100]})") from None
    return _networks(parsed, MAX_STAGES)


def _networks(parsed: object, stages: int) -> Networks:
    if not stages:
        raise ValueError(f"a layout must have at most {MAX_STAGES} stages, one inside another")
    if isinstance(parsed, list) and len(parsed) == 1:
        return Networks(main=_letters(parsed[0]))
    if isinstance(parsed, list) and len(parsed) == 3:
        return Networks(_letters(parsed[0]), _networks(parsed[1], stages - 1), _letters(parsed[2]))
    raise ValueError(f"a stage of a layout must be a list of one or three parts; got {shown(parsed)}")


def _letters(part: object) -> str:
    if not isinstance(part, str) or not re.fullmatch(r"([mMtT]\d{1,9})*", part):
        raise ValueError(
            f'a network of a layout must be letters of mMtT, each with a number, such as "T1m4"; got {shown(part)}'
        )
    runs = [(letter, int(number)) for letter, number in re.findall(r"([mMtT])(\d+)", part)]
    if sum(number for _, number in runs) > MAX_LAYERS:
        raise ValueError(f"a network of a layout must have at most {MAX_LAYERS} layers; got {shown(part)}")
    return "".join(letter * number for letter, number in runs)


@dataclass(frozen=True)
class HNetConfig(AbstractShape):
    """Shape of an H-Net of any depth (H-Net section 2.1). Tuples have one number for each stage, the outermost first.

    Raises `ValueError` for values that cannot make a model.
    """

    layout: str
    """Layers of all networks, as published: `["m4", ["T1m4", ["T26"], "m4T1"], "m4"]`."""
    dims: tuple[Width, ...]
    """Widths of hidden states; they never shrink inward."""
    mlp_dims: tuple[Annotated[int, Within(0, 2**20)], ...]
    """Inner widths of the MLPs; 0 at stages without any."""
    heads: tuple[Annotated[int, Within(0, 2**16)], ...]
    """Attention heads."""
    rotary_dims: tuple[Annotated[int, Within(0, 2**16)], ...]
    """Dimensions of a head with rotary embeddings."""
    windows: tuple[Annotated[int, Within(0, 2**24)], ...]
    """Positions that attention sees, its own included; 0 for all before it."""
    state: Width = 128
    """Columns of the state matrix of a Mamba-2 head (d_state)."""
    conv_width: Annotated[int, Within(1, 1024)] = 4
    """Positions that the convolution of a Mamba-2 layer sees, its own included."""
    expand: Annotated[int, Within(1, 64)] = 2
    """Inner width of a Mamba-2 layer, as a multiple of its stage's width."""
    network_norms: bool = True
    """End every network with a norm, not only the last one."""
    token_positions: Literal["byte", "chunk"] = "chunk"
    """Rotary positions of tokens: the index of the token, or the position of its boundary in the level around."""
    tie_embeddings: bool = False
    """Tie the output head to the byte embedding."""
    experts: Annotated[int, Within(1, 1024)] = 1
    """Experts that the MLP of every layer is replaced by: a mixture, for shapes without token levels; 1: a plain MLP."""
    experts_chosen: Annotated[int, Within(1, 1024)] = 1
    """Experts that every position chooses."""
    expert_capacity: Annotated[float, Within(0.01, 1024.0)] = 1.25
    """Positions of a sequence that each expert has room for in training, as a multiple of what equal shares would be; choices
    beyond are dropped and counted."""
    balance_weight: Weight = 0.01
    """Weight of the loss that balances the experts, summed over layers."""
    embedding_std: Positive = 1.0
    """Standard deviation of the initial embedding; 0.02 suits a tied one of many tokens."""

    def __post_init__(self):
        super().__post_init__()
        networks = read_layout(self.layout)
        stages = networks.depth + 1
        for name in ("dims", "mlp_dims", "heads", "rotary_dims", "windows"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name} needs {stages} numbers, one for each stage; got {getattr(self, name)}")
        if any(inner < outer for outer, inner in zip(self.dims, self.dims[1:], strict=False)):
            raise ValueError(f"widths must grow inward or stay equal; got dims {self.dims}")
        for stage, letters in enumerate(_stages(networks)):
            self._check_stage(stage, letters)
        if self.attend != "none":
            self._check_attend(networks)
        if self.experts > 1 and networks.depth:
            raise ValueError(f"experts {self.experts} are for layouts without token levels; got {self.layout}")
        if self.experts_chosen > self.experts:
            raise ValueError(f"experts_chosen {self.experts_chosen} is more than there are experts, {self.experts}")

    def _check_stage(self, stage: int, letters: str) -> None:
        dim, heads, rotary_dim = self.dims[stage], self.heads[stage], self.rotary_dims[stage]
        attends = bool(set(letters) & set("tT"))
        if attends and heads < 1:
            raise ValueError(f"stage {stage} has attention layers ({letters}): its heads must be at least 1")
        if attends and (dim % heads or rotary_dim % 2 or not 0 <= rotary_dim <= dim // heads):
            raise ValueError(
                f"stage {stage}: {heads} heads must divide its width in dims, {dim}, and rotary_dims be an even number of "
                f"dimensions of a head; got {rotary_dim}"
            )
        if set(letters) & set("mM") and self.expand * dim % HEAD:
            raise ValueError(
                f"stage {stage}: expand x dims, {self.expand} x {dim}, is not a multiple of {HEAD}, as Mamba-2 layers need"
            )
        if set(letters) & set("MT") and self.mlp_dims[stage] < 1:
            raise ValueError(
                f"stage {stage} has layers with an MLP ({letters}): its width in mlp_dims must be at least 1"
            )

    def _check_attend(self, networks: Networks) -> None:
        """Every stage but the innermost needs a decoder with layers, and heads that divide its width."""
        if networks.inside is None:
            raise ValueError(f"attend {self.attend} needs a token level, but {self.layout} has none")
        for stage in range(networks.depth):
            inside = _at(networks, stage)
            if not inside.decoder or self.heads[stage] < 1 or self.dims[stage] % self.heads[stage]:
                raise ValueError(
                    f"stage {stage}: to attend to tokens a decoder needs a layer, and a width that its heads divide; got "
                    f"{len(inside.decoder)} layers, {self.heads[stage]} heads and a width of {self.dims[stage]}"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        return self.dims

    @property
    def attention_layers(self) -> tuple[tuple[int, int | None], ...]:
        attending = [
            stage for stage, letters in enumerate(_stages(read_layout(self.layout))) if set(letters) & set("tT")
        ]
        return tuple((self.dims[stage] // self.heads[stage], self.windows[stage] or None) for stage in attending)

    def parts(self, estimators: Sequence[AbstractEstimator], *, key: PRNGKeyArray, vocab: int = VOCAB) -> Parts:
        """Weights are initialised as in the released code: normal with standard deviation .02. For the projections that end a
        layer this is divided by the square root of the number of residual additions in this stage and the stages around it. The
        embedding, tied or not, has a standard deviation of `embedding_std`."""
        networks = read_layout(self.layout)
        if len(estimators) != networks.depth:
            raise ValueError(f"{self.layout} has {networks.depth} token levels; got {len(estimators)} estimators")
        head = None
        if not self.tie_embeddings:
            head = Linear.of(STD * jax.random.normal(named_key(key, "head"), (self.dims[0], vocab), jnp.float32))
        embedding = jax.random.normal(named_key(key, "embedding"), (vocab, self.dims[0]), jnp.float32)
        embedding = embedding * self.embedding_std
        stage = self._stage(networks, 0, 0, tuple(estimators), named_key(key, "stage"))
        return Parts(embedding, stage, None, head, self.new_ngrams(key))

    def _stage(
        self,
        networks: Networks,
        stage: int,
        residuals: int,
        estimators: tuple[AbstractEstimator, ...],
        key: PRNGKeyArray,
    ) -> AbstractStage:
        # Residual additions of this stage and the stages around it.
        residuals += _residuals(networks.main + networks.encoder + networks.decoder)
        key_encoder, key_inside, key_decoder = (named_key(key, name) for name in ("encoder", "inside", "decoder"))
        if networks.inside is None:
            own: AbstractStage = Flat(self._stack(networks.main, stage, residuals, key_encoder, last=stage == 0))
        else:
            own = Hierarchy(
                self._stack(networks.encoder, stage, residuals, key_encoder),
                estimators[0],
                self._stage(networks.inside, stage + 1, residuals, estimators[1:], key_inside),
                attending(
                    self._stack(networks.decoder, stage, residuals, key_decoder, last=stage == 0),
                    self.attend,
                    dim=self.dims[stage],
                    heads=self.heads[stage],
                    vectors=self.attend_vectors,
                    key=named_key(key, "attention to tokens"),
                ),
                chunk_positions=self.token_positions == "chunk",
                implementation=self.implementation,
            )
        wider = self.dims[stage] - self.dims[stage - 1] if stage else 0
        return Widened(jnp.zeros((wider,), jnp.float32), own) if wider else own

    def _stack(self, letters: str, stage: int, residuals: int, key: PRNGKeyArray, *, last: bool = False) -> Stack:
        """The stack of a network. `last`: whether the output head follows, which needs a norm before it. `residuals`: see
        `parts`."""
        keys = jax.random.split(key, len(letters))
        blocks = [self._block(letter, stage, residuals, one) for letter, one in zip(letters, keys, strict=True)]
        norm = ScaleNorm(self.dims[stage]) if self.network_norms or last else None
        return Stack(
            blocks,
            window=self.windows[stage] or None,
            remat=self.always_remat,
            norm=norm,
            attention=self.attention_form,
            implementation=self.implementation,
        )

    def _block(self, letter: str, stage: int, residuals: int, key: PRNGKeyArray) -> PreNorm:
        dim, heads, rotary_dim = self.dims[stage], self.heads[stage], self.rotary_dims[stage]
        key_mixer, key_mlp, key_draw = jax.random.split(key, 3)
        if letter in "mM":
            mixer = Mamba2(dim, state=self.state, conv_width=self.conv_width, expand=self.expand, key=key_mixer)
        else:
            mixer = Attention(dim, heads, cap=None, rotary_dim=rotary_dim, key=key_mixer)
        mlp = self._mlp(stage, residuals, key_mlp) if letter in "MT" else None
        return _reinitialised(PreNorm(dim, mixer, mlp), residuals, key_draw)

    def _mlp(self, stage: int, residuals: int, key: PRNGKeyArray) -> SwiGLU | Experts:
        dim, hidden = self.dims[stage], self.mlp_dims[stage]
        if self.experts == 1:
            return SwiGLU(dim, hidden, key=key)
        return Experts(
            dim,
            hidden,
            self.experts,
            choices=self.experts_chosen,
            capacity_factor=self.expert_capacity,
            balance_weight=self.balance_weight,
            std=STD,
            out_std=STD / residuals**0.5,
            key=key,
        )


def _stages(networks: Networks) -> list[str]:
    """The letters of each stage, the outermost first."""
    own = networks.encoder + networks.main + networks.decoder
    return [own] if networks.inside is None else [own, *_stages(networks.inside)]


def _at(networks: Networks, stage: int) -> Networks:
    """The networks of stage number `stage`."""
    return networks if stage == 0 or networks.inside is None else _at(networks.inside, stage - 1)


def _residuals(letters: str) -> int:
    """How often the layers add to the residual stream: once each, twice with an MLP."""
    return sum(2 if letter in "MT" else 1 for letter in letters)


def _reinitialised(block: PreNorm, residuals: int, key: PRNGKeyArray) -> PreNorm:
    """The block with its matrices drawn as in the released code."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(block, is_leaf=lambda node: isinstance(node, Linear))
    drawn = []
    for number, (path, leaf) in enumerate(leaves):
        if isinstance(leaf, Linear):
            last = path[-1]
            assert isinstance(last, jax.tree_util.GetAttrKey)
            std = STD / residuals**0.5 if last.name in ("out", "project_out") else STD
            normal: Float[Array, "inputs outputs"] = jax.random.normal(
                jax.random.fold_in(key, number), leaf.weight.shape[::-1], jnp.float32
            ).T
            leaf = Linear.of(std * normal)
        drawn.append(leaf)
    return jax.tree_util.tree_unflatten(tree, drawn)
