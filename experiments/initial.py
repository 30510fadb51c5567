"""Training that starts from weights that are there already."""

from __future__ import annotations

from pathlib import Path

import equinox as eqx
import jax

from experiments.config import ConfigError
from unet.model import UNet
from unet.pretrained import load_hnet
from unet.saving import WEIGHTS, load


def initial_weights(where: str, fresh: UNet) -> UNet:
    """`fresh` with the weights of another model of the same parts: a run's folder or an exported model, `hub:owner/name`, or a
    published H-Net by its name on the hub or by its file.

    Raises `LoadError` where there is no model, `ConfigError` where it is made of other parts.
    """
    known = where.startswith("hub:") or (Path(where) / WEIGHTS).is_file()
    found = load(where).model if known else load_hnet(where)
    ours, theirs = (jax.tree_util.tree_flatten_with_path(eqx.filter(one, eqx.is_array))[0] for one in (fresh, found))
    shapes = [{jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves} for leaves in (ours, theirs)]
    differing = sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
    if differing:
        raise ConfigError(
            f"--init {where} is a model of other parts than this run's: {len(differing)} of its arrays are missing, left over "
            f"or of another shape, such as {differing[0]}; name the --model, --estimator and settings it was made with"
        )
    leaves = [leaf for _, leaf in theirs]
    params, rest = eqx.partition(fresh, eqx.is_array)
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(params), leaves), rest)
