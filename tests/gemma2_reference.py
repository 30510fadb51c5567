"""A byte-level model of this library as a Gemma-2 of `transformers`, scored by the `hf` backend of lm-evaluation-harness.

`python -m tests.gemma2_reference` made `golden/gemma2_harness.npz`, with torch 2.14.1, transformers 5.24.0, accelerate 1.15.0,
peft 0.21.2 and lm_eval 0.4.13, on a CPU in float32: random weights in the layout of `Gemma2ForCausalLM` (`param.*`), and what
`findings` returns for the `hf` backend (`found`, as JSON). The tokenizer has a token for each byte, with BOS for the byte 254 and
EOS for 255, neither of which is in UTF-8.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.instance import Instance, OutputType
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from estimators.base import BOS, EOS
from tests.conftest import GOLDEN
from tests.local_tasks import write_tasks
from unet import Flat, UNet, UNetConfig

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

DIM, HEADS, LAYERS, WINDOW, CONTEXT = 16, 2, 2, 8, 128
TASKS = ("piqa", "hellaswag", "arc_easy", "winogrande", "lambada_openai", "cute_spell")
PAIRS = (
    ("She opened the", " door"),
    ("", "Once upon a time"),
    ("né à", " Paris"),
    ("猫", "和狗"),
    ("a b c " * 30 + "d", " e f g"),
)
"""Contexts and continuations; the last context is longer than the model reads."""
TEXTS = ("so it goes", "né, and then " * 8, "x")
PROMPTS = (("The", ["uM"]), ("one two", ["\n", "zz"]))
"""Contexts and stop strings."""
STACKED = {
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.out": ["self_attn.o_proj"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}
NORMS = {
    "before_attention": "input_layernorm",
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}

Params = Mapping[str, np.ndarray]


def random_params(seed: int = 0) -> Params:
    """Weights in Gemma-2's layout (outputs x inputs), large enough that predictions differ."""
    rng = np.random.default_rng(seed)

    def matrix(outputs: int, inputs: int) -> np.ndarray:
        return (rng.normal(size=(outputs, inputs)) / math.sqrt(inputs)).astype(np.float32)

    # Letters are likelier than other bytes, so that what is generated is text.
    scale = np.where([chr(value).isascii() and chr(value).isalpha() for value in range(256)], 3.0, 0.5)[:, None]
    params = {"model.embed_tokens.weight": matrix(256, DIM)}
    params["lm_head.weight"] = (scale * matrix(256, DIM)).astype(np.float32)
    params["model.norm.weight"] = (0.3 * rng.normal(size=DIM)).astype(np.float32)
    for layer in range(LAYERS):
        for name in (one for names in STACKED.values() for one in names):
            params[f"model.layers.{layer}.{name}.weight"] = matrix(DIM, DIM)
        for name in NORMS.values():
            params[f"model.layers.{layer}.{name}.weight"] = (0.3 * rng.normal(size=DIM)).astype(np.float32)
    return params


def from_gemma2(params: Params) -> UNet:
    """The same model of this library."""
    model = UNet(UNetConfig(DIM, HEADS, LAYERS, 1, 0, window=WINDOW), None, key=jax.random.key(0))

    def weights(model: UNet) -> list:
        assert isinstance(model.stage, Flat)
        assert model.norm is not None
        assert model.head is not None
        found = [model.embedding, model.norm.weight, model.head.weight]
        for block in model.stage.stack.blocks:
            for path in (*STACKED, *NORMS):
                found.append(attrgetter(f"{path}.weight")(block))
        return found

    # Gemma multiplies embeddings by the square root of their width.
    new = [
        params["model.embed_tokens.weight"] * math.sqrt(DIM),
        params["model.norm.weight"],
        params["lm_head.weight"].T,
    ]
    for layer in range(LAYERS):
        of = f"model.layers.{layer}"
        new += [np.concatenate([params[f"{of}.{one}.weight"] for one in names]).T for names in STACKED.values()]
        new += [params[f"{of}.{name}.weight"] for name in NORMS.values()]
    return eqx.tree_at(weights, model, [jnp.asarray(one, jnp.float32) for one in new])


def hf_model(params: Params, *, begins: bool) -> HFLM:
    """The model in the `hf` backend. `begins`: texts begin with a BOS, as those of this library do. The backend's rolling
    likelihood puts one there by itself."""
    import torch  # pyrefly: ignore[missing-import] -- installed where the golden file is made
    from lm_eval.models.huggingface import HFLM
    from transformers import Gemma2Config, Gemma2ForCausalLM  # pyrefly: ignore[missing-import] -- likewise

    config = Gemma2Config(
        vocab_size=256,
        hidden_size=DIM,
        intermediate_size=DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM // HEADS,
        query_pre_attn_scalar=DIM // HEADS,
        max_position_embeddings=CONTEXT,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] * LAYERS,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=None,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config).eval()
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in params.items()})
    return HFLM(
        pretrained=model,
        tokenizer=byte_tokenizer(),
        add_bos_token=begins,
        max_length=CONTEXT,
        device="cpu",
        batch_size=4,
    )


def byte_tokenizer():
    """A `transformers` tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast  # pyrefly: ignore[missing-import] -- likewise

    # How byte-level tokenizers spell bytes: those that are no printable character of Latin-1 by characters from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    spelled = {value: chr(value) for value in printable} | {
        value: chr(0x100 + place) for place, value in enumerate(others)
    }
    vocabulary = {spelled[value]: value for value in range(256) if value not in (BOS, EOS)} | {
        "<bos>": BOS,
        "<eos>": EOS,
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


def findings(model: LM, rolling: LM, tasks: Mapping) -> dict[str, object]:
    """What a model says of the pairs, the texts, the prompts and the tasks. The numbers are nats."""

    def asked(kind: OutputType, *arguments: object) -> Instance:
        return Instance(kind, {}, arguments, 0, (kind, 0, 1))

    settings = {"max_gen_toks": 12, "do_sample": False}
    generated = model.generate_until(
        [asked("generate_until", prompt, {"until": stops, **settings}) for prompt, stops in PROMPTS]
    )
    # What is generated is what is likeliest.
    after_prompts = [(prompt, text) for (prompt, _), text in zip(PROMPTS, generated, strict=True)]
    pairs = model.loglikelihood([asked("loglikelihood", *pair) for pair in (*PAIRS, *after_prompts)])
    found = evaluate(model, {"tasks": dict(tasks)}, bootstrap_iters=0)
    scores = {
        f"{task} {metric}": value
        for task, values in found["results"].items()
        for metric, value in values.items()
        if metric.endswith(",none") and "stderr" not in metric
    }
    likelihoods = {
        task: [[one[0] for one in sample["filtered_resps"]] for sample in samples]
        for task, samples in found["samples"].items()
        if task != "cute_spell"
    }
    return {
        "pairs": [log_prob for log_prob, _ in pairs],
        "greedy": [bool(is_greedy) for _, is_greedy in pairs],
        "rolling": rolling.loglikelihood_rolling([asked("loglikelihood_rolling", text) for text in TEXTS]),
        "generated": generated,
        "scores": scores,
        "likelihoods": likelihoods,
    }


def main() -> None:
    """Write the golden file."""
    from experiments.tasks.harness import open_tasks

    params = random_params()
    with tempfile.TemporaryDirectory() as folder:
        tasks = open_tasks(TASKS, [write_tasks(Path(folder))]).tasks
        for task in tasks.values():
            task.set_config(key="num_fewshot", value=0)
        found = findings(hf_model(params, begins=True), hf_model(params, begins=False), tasks)
    named = {f"param.{name}": value for name, value in params.items()}
    np.savez_compressed(GOLDEN / "gemma2_harness.npz", allow_pickle=False, found=json.dumps(found), **named)


if __name__ == "__main__":
    main()
