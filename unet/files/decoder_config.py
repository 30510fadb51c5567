"""Published configurations of language models of tokens, as `transformers` reads them: Llama and GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unet.decoders import GPT2Config, LlamaConfig
from unet.files.config_values import Settings
from unet.files.converted import WeightType
from unet.files.errors import LayoutError, shown
from unet.layers import RotaryScaling

LLAMA, GPT2 = "llama", "gpt2"
"""The model types that are read."""

_WITHOUT_EFFECT = frozenset(
    {
        "architectures",
        "_name_or_path",
        "name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "model_type",
        "initializer_range",
        "use_cache",
        "pretraining_tp",
        "pad_token_id",
        "max_position_embeddings",
        "attention_dropout",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "gradient_checkpointing",
        "problem_type",
        "n_ctx",
        "return_dict",
        "output_past",
        "task_specific_params",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "id2label",
        "label2id",
        "chunk_size_feed_forward",
        "use_return_dict",
        "_attn_implementation_autoset",
        "attn_implementation",
        "reorder_and_upcast_attn",
        "output_attentions",
        "output_hidden_states",
        "num_labels",
        "_num_labels",
        "n_special",
        "predict_special_tokens",
        "is_llama_config",
        "transformers.js_config",
        "neftune_noise_alpha",
    }
)
"""What says nothing of the function that weights make: metadata, initial values, dropout, other tasks, precision."""

_LLAMA: Mapping[str, object] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2: Mapping[str, object] = {
    "vocab_size": 50_257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "bos_token_id": 50_256,
    "eos_token_id": 50_256,
}
USUAL: Mapping[str, Mapping[str, object]] = {LLAMA: _LLAMA, GPT2: _GPT2}
"""What holds where a configuration says nothing: saved ones leave out what is as usual."""

_ONLY: Mapping[str, tuple[object, str]] = {
    "hidden_act": ("silu", "gates are SiLU"),
    "attention_bias": (False, "Llamas with biases are not read"),
    "mlp_bias": (False, "Llamas with biases are not read"),
    "rope_interleaved": (False, "rotated pairs are dimensions of the two halves of a head"),
    "scale_attn_weights": (True, "attention divides by the root of the width of a head"),
    "scale_attn_by_inverse_layer_idx": (False, "attention divides by the root of the width of a head alone"),
    "add_cross_attention": (False, "there is nothing else to attend to"),
}
"""The one value that some settings may have, and why."""

_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""The names of one function: GELU by the hyperbolic tangent."""


@dataclass(frozen=True)
class DecoderDescription:
    """What a configuration describes: the shape of the model, the number of its tokens, and those that mark the start and the end
    of a document, if it says."""

    shape: LlamaConfig | GPT2Config
    vocab: int
    marks: tuple[int, int] | None


def is_decoder(config: Mapping[str, object]) -> bool:
    """Whether this is the configuration of a language model of tokens that is read."""
    return config.get("model_type") in USUAL


def described(config: Mapping[str, object], *, compute: WeightType = "float32") -> DecoderDescription:
    """What a published configuration describes. Raises `LayoutError` if it is invalid, and for parts that are not read."""
    kind = config.get("model_type")
    assert isinstance(kind, str)
    unknown = [name for name, value in config.items() if value and name not in {*USUAL[kind], *_WITHOUT_EFFECT}]
    if unknown:
        raise LayoutError(
            f"this configuration of a {kind} has {shown(unknown[0])} {shown(repr(config[unknown[0]]))}, which is not read here"
        )
    settings = Settings("", {**USUAL[kind], **config})
    settings.require_usual(_ONLY)
    try:
        shape = _llama(settings, compute) if kind == LLAMA else _gpt2(settings, compute)
    except ValueError as error:
        raise LayoutError(f"this configuration is not a valid {kind}: {error}") from None
    return DecoderDescription(shape, settings.whole("vocab_size", 1, 2**20), _marks(settings))


def _llama(settings: Settings, compute: WeightType) -> LlamaConfig:
    dim, heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    if settings.values["head_dim"] not in (None, dim // heads):
        raise LayoutError(
            f"head_dim is {shown(repr(settings.values['head_dim']))}, not {dim} / {heads}: heads share the width"
        )
    kv_heads = settings.optional("num_key_value_heads") or heads
    if heads % kv_heads:
        raise LayoutError(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    base, scaling = _rotary(settings)
    return LlamaConfig(
        dim=dim,
        layers=settings.whole("num_hidden_layers", 0, 4096),
        heads=heads,
        kv_heads=kv_heads,
        mlp_dim=settings.whole("intermediate_size"),
        epsilon=settings.number("rms_norm_eps", 0.0),
        rotary_base=base,
        rotary_scaling=scaling,
        tie_embeddings=settings.truth("tie_word_embeddings"),
        compute=compute,
    )


def _gpt2(settings: Settings, compute: WeightType) -> GPT2Config:
    if settings.values["activation_function"] not in _GELUS:
        raise LayoutError(
            f"activation_function is {shown(repr(settings.values['activation_function']))}, not gelu_new: no GPT-2 has another"
        )
    dim = settings.whole("n_embd")
    return GPT2Config(
        dim=dim,
        layers=settings.whole("n_layer", 0, 4096),
        heads=settings.whole("n_head"),
        mlp_dim=settings.optional("n_inner") or 4 * dim,
        epsilon=settings.number("layer_norm_epsilon", 0.0),
        positions=settings.whole("n_positions"),
        tie_embeddings=settings.truth("tie_word_embeddings"),
        compute=compute,
    )


def _rotary(settings: Settings) -> tuple[float, RotaryScaling | None]:
    """The base of rotary embeddings and their scaling; older configurations have the base beside `rope_scaling`."""
    rope = settings.values["rope_parameters"] or settings.values["rope_scaling"] or {}
    if not isinstance(rope, Mapping):
        raise LayoutError(f"rope_parameters must be an object with settings; got {shown(repr(rope))}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = rope.get("rope_theta") or settings.values["rope_theta"] or 10_000.0
    inside = Settings("rope_parameters.", {"partial_rotary_factor": 1.0, **rope, "rope_theta": base})
    inside.require_usual({"partial_rotary_factor": (1.0, "all dimensions of a head are rotated")})
    if kind == "default":
        return inside.number("rope_theta", 1.0), None
    if kind != "llama3":
        raise LayoutError(
            f"rope_parameters has the rope_type {shown(repr(kind))}: positions are scaled as in Llama 3 (llama3) or not at all "
            "(default)"
        )
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    lacking = [name for name in names if name not in rope]
    if lacking:
        raise LayoutError(f"rope_parameters.{lacking[0]} is missing, which the rope_type llama3 needs")
    factor, low, high, original = (inside.number(name, 1e-6) for name in names)
    if low >= high:
        raise LayoutError(f"rope_parameters: low_freq_factor {low:g} must be less than high_freq_factor {high:g}")
    return inside.number("rope_theta", 1.0), RotaryScaling(factor, low, high, original)


def _marks(settings: Settings) -> tuple[int, int] | None:
    """The tokens that mark the start and the end of a document: either may stand for both; of several ends the first."""
    found: list[int | None] = []
    for name in ("bos_token_id", "eos_token_id"):
        value = settings.values[name]
        first = value[0] if isinstance(value, list) and value else value
        if first is not None and (type(first) is not int or not 0 <= first < 2**20):
            raise settings.fail(name, "the number of a token")
        found.append(first)
    start, end = found
    if start is None and end is None:
        return None
    start, end = end if start is None else start, start if end is None else end
    assert start is not None
    assert end is not None
    return start, end
