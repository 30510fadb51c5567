"""Ways from byte rows to token rows and back, on top of the ragged ops."""

from jaxtyping import Array, Float

from estimators.base import AbstractChunker, Boundaries, TokenRows
from unet.ops import downsample, upsample


class SelectDistribute(AbstractChunker):
    r"""Select the rows at boundaries; add each token's output to the bytes that follow it (SFE eq. 7-8).

    $X'_m = X_{i_m}$, $Y_i = X_i + Y'_{\mathrm{token\_of}(i)}$. No gradient reaches the boundaries.
    """

    def down(self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, *, capacity: int) -> TokenRows:
        return downsample(hidden, boundaries.actions, capacity)

    def up(
        self,
        outputs: Float[Array, "batch tokens dim"],
        rows: TokenRows,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
    ) -> Float[Array, "batch length dim"]:
        return hidden + upsample(outputs, boundaries.actions)


class SelectDeviate(AbstractChunker):
    r"""As `SelectDistribute`, but adds only what the token level changed (an earlier version of the authors' code).

    $Y_i = X_i + (Y' - X')_{\mathrm{token\_of}(i)}$.
    """

    def down(self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, *, capacity: int) -> TokenRows:
        return downsample(hidden, boundaries.actions, capacity)

    def up(
        self,
        outputs: Float[Array, "batch tokens dim"],
        rows: TokenRows,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
    ) -> Float[Array, "batch length dim"]:
        return hidden + upsample(outputs - rows.values, boundaries.actions)
