"""Training steps on 8 virtual devices and on one, for the tests of meshes, which read what it prints: a line of JSON for each.

`python -m tests.mesh_steps NAME:DATAxFSDPxTENSOR:STEPS …`; a name is that of an estimator.
"""

import dataclasses
import json
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from estimators import Stride, trainable
from experiments.benchmark.collectives import collectives_of, of_shared_layers, on_paper
from experiments.config.sections import MeshConfig
from experiments.config.settings import RunConfig
from experiments.evaluation.evaluate import evaluate_without_drops
from experiments.training.placement import Placement
from experiments.training.step import compiled
from experiments.training.trainer import Trainer
from experiments.training.validation import PlacedPass
from tests.compositions import config_of, registered
from tests.conftest import text_bytes
from unet import Chunker, Distribute, Select, TokenModel, UNet, UNetConfig
from unet.likelihood import plain_layout
from unet.tokens.tokenizer import train_tokenizer

BATCH, LENGTH = 8, 24
VALIDATED = ("sfe:2x4x1:20", "hnet:1x8x1:20", "gumbel:2x2x2:1", "sfe-offpolicy:2x2x2:1", "isotropic:2x2x2:1")
"""What is validated as well."""
TOKENS = "tokens"
"""Asks for the validation of a model of tokens alone."""
DIVIDED_FROM = 128
"""Leaves of fewer numbers are whole."""


def run_of(name: str, mesh: MeshConfig) -> RunConfig:
    """A run of an estimator on a small model and a mesh."""
    return dataclasses.replace(config_of(name), batch=BATCH, length=LENGTH, steps=20, mesh=mesh)


def batch_of(placement: Placement, step: int) -> dict[str, Array]:
    """Text, with the end of a few sequences padding and a document beginning in their middle."""
    lengths = LENGTH - 3 * (np.arange(BATCH) % 3)
    segments = np.broadcast_to(np.arange(LENGTH) >= LENGTH // 2, (BATCH, LENGTH)) & (np.arange(BATCH)[:, None] % 4 == 1)
    arrays = {
        "bytes": np.asarray(text_bytes(BATCH, LENGTH, step), np.uint8),
        "segments": segments.astype(np.int32),
        "mask": np.arange(LENGTH) < lengths[:, None],
    }
    return placement.inputs(arrays)


def compared(asked: str) -> dict[str, object]:
    """Losses, metrics and parameters after some steps on a mesh and on one device, and the collectives of a step."""
    name, mesh, steps = asked.split(":")
    data, fsdp, tensor = map(int, mesh.split("x"))
    config = run_of(name, MeshConfig(data=data, fsdp=fsdp, tensor=tensor, whole_below=DIVIDED_FROM))
    model = registered(name, config)
    trainer = Trainer.of(config, model, (LENGTH,))
    found, texts = [], []
    for one in (dataclasses.replace(config, devices=1, mesh=MeshConfig()), config):
        placement = Placement.of(one)
        state, batch = placement.divided(trainer.first_state()), batch_of(placement, 0)
        key = jax.random.key(7)
        step = compiled(trainer.step_on(placement)).lower(state, batch, key).compile()
        texts.append(step.as_text())
        outputs = []
        for number in range(int(steps)):
            state, metrics = step(state, batch_of(placement, number), jax.random.fold_in(key, number))
            outputs.append([float(leaf) for leaf in jax.tree.leaves(metrics)])
        found.append((outputs, placement.whole(state.params)))
    (ours, params), (theirs, on_mesh) = found
    sizes = placement.mesh.shape
    paper = on_paper(placement.leaves(trainer.params), sizes)
    moving, frozen = eqx.partition(trainer.params, trainable(trainer.params))
    for part, backward in ((moving, True), (frozen, False)):
        layers = 2 * sum("qkv" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(part))
        shape = BATCH // (sizes["data"] * sizes["fsdp"]), LENGTH, model.embedding.shape[1]
        paper += of_shared_layers(layers, shape, sizes, width=4, backward=backward)
    return {
        "asked": asked,
        "metrics": float(np.max(np.abs(np.asarray(ours) - np.asarray(theirs)) / np.maximum(1.0, np.abs(ours)))),
        "params": max(
            float(np.max(np.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (params, on_mesh)), strict=True)
        ),
        "validation": validated(trainer, config) if asked in VALIDATED else None,
        "collectives": [dataclasses.astuple(one) for one in collectives_of(texts[1])],
        "on_paper": [dataclasses.astuple(one) for one in paper],
    }


def validated(trainer: Trainer, config: RunConfig) -> float:
    """How far the log-probabilities of validations on the mesh are from those on one device, with drawn and with prescribed
    boundaries; infinite where boundaries or counts differ. There are fewer rows than devices can share evenly, and so few tokens
    that some rows have to be computed again."""
    layout, key = plain_layout(text_bytes(BATCH - 3, LENGTH, 1)), jax.random.key(3)
    found = []
    for one in (dataclasses.replace(config, devices=1, mesh=MeshConfig()), config):
        placement = Placement.of(one)
        params = placement.divided(trainer.first_state()).params
        passes = PlacedPass(placement, params, trainer.static)
        drawn = evaluate_without_drops(passes, layout, key, 4)
        greedy = evaluate_without_drops(passes, layout, key, 4, (jnp.asarray(drawn["greedy"]),))
        found.append((drawn, greedy))
    differences = []
    for ours, theirs in zip(*found, strict=True):
        exact = [name for name, array in ours.items() if array.dtype.kind != "f"]
        if not all(np.array_equal(ours[name], theirs[name]) for name in exact):
            return float("inf")
        differences += [float(np.nanmax(np.abs(ours[name] - theirs[name]))) for name in ("log_prob", "probs")]
    return max(differences)


def tokens_validated() -> float:
    """The same for a model of tokens with chunks of two tokens, of all rows at once."""
    config = run_of("stride", MeshConfig(data=2, fsdp=2, tensor=2, whole_below=DIVIDED_FROM))
    tokenizer = train_tokenizer([bytes(row) for row in np.asarray(text_bytes(BATCH, 4 * LENGTH, 2), np.uint8)], 270)
    shape = UNetConfig(dim=8, heads=2, encoder_layers=1, main_layers=1, decoder_layers=1, window=4)
    estimator = Stride(chunker=Chunker(Select(), Distribute()), stride=2)
    model = TokenModel(tokenizer, UNet(shape, estimator, key=jax.random.key(5), vocab=tokenizer.size))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    layout, found = plain_layout(text_bytes(BATCH - 3, LENGTH, 1)), []
    for one in (dataclasses.replace(config, devices=1, mesh=MeshConfig()), config):
        placement = Placement.of(one)
        passes = PlacedPass(placement, placement.divided(params), static)
        found.append(passes.results(layout, jax.random.key(3), None))
    ours, theirs = found
    same = np.array_equal(ours.drawn, theirs.drawn)
    return float(np.max(np.abs(ours.log_prob - theirs.log_prob))) if same else float("inf")


def main(asked: list[str]) -> None:
    # Two elsewhere in the tests.
    jax.config.update("jax_num_cpu_devices", 8)
    with jax.numpy_dtype_promotion("standard"):
        for one in asked:
            found = {"asked": one, "validation": tokens_validated()} if one == TOKENS else compared(one)
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
