"""The variables of published models: their shapes, worked out from configurations as Hugging Face publishes them."""

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from fused_kopt.commands.common import RefusedError

Shape = tuple[int, ...]
Config = Mapping[str, Any]


class Model(NamedTuple):
    """A model's variables."""

    name: str
    source: str
    groups: tuple[tuple[Shape, ...], ...]
    """In the order of the forward pass, what is needed together: the embedding, each layer, the head."""
    active: int
    """Parameters that one token meets: all, but of the experts only those that it is sent to."""

    @property
    def shapes(self) -> list[Shape]:
        """One for each variable."""
        return [shape for group in self.groups for shape in group]

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum(map(prod, self.shapes))


_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}


def _wide(hidden: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    return {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}


# By name: where the config.json is published, and what of it says the shapes.
CATALOGUE: dict[str, tuple[str, Config]] = {
    "gpt2": ("openai-community/gpt2", {**_GPT2, "n_embd": 768, "n_layer": 12, "n_head": 12}),
    "gpt2-xl": ("openai-community/gpt2-xl", {**_GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", {**_LLAMA, **_wide(4096, 14336, 32, 32)}),
    "llama-3-70b": ("meta-llama/Meta-Llama-3-70B", {**_LLAMA, **_wide(8192, 28672, 80, 64)}),
    "llama-3-405b": ("meta-llama/Llama-3.1-405B", {**_LLAMA, **_wide(16384, 53248, 126, 128)}),
    "mixtral-8x7b": (
        "mistralai/Mixtral-8x7B-v0.1",
        {"model_type": "mixtral", "vocab_size": 32000, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
        | {"tie_word_embeddings": False, **_wide(4096, 14336, 32, 32)},
    ),
    "deepseek-v2-lite": (
        "deepseek-ai/DeepSeek-V2-Lite",
        {"model_type": "deepseek_v2", "vocab_size": 102400, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2}
        | {"num_experts_per_tok": 6, "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128}
        | {"qk_rope_head_dim": 64, "v_head_dim": 128, "tie_word_embeddings": False, **_wide(2048, 10944, 27, 16)},
    ),
}
PARTS = 32  # into which a mere number of parameters is divided: as many as a model of 7e9 has layers


def model(text: str) -> Model:
    """A model of the catalogue, of a file like Hugging Face's config.json, or of so many parameters (`7e9`).

    Raises RefusedError for anything else, and for a file whose shapes are not known here.
    """
    if text in CATALOGUE:
        source, config = CATALOGUE[text]
        return _built(text, f"config.json of huggingface.co/{source}", config)
    path = Path(text)
    if path.suffix == ".json" or path.is_file():
        return _built(path.name, str(path), _read(path))
    try:
        parameters = float(text)
    except ValueError:
        raise RefusedError(
            f"--model must be one of {', '.join(CATALOGUE)}, a config.json, or a number of parameters such as 7e9. Received: {text}."
        ) from None
    if not PARTS <= parameters <= 1e15:
        raise RefusedError(f"--model: a number of parameters must be {PARTS} to 1e15. Received: {text}.")
    part = -(-int(parameters) // PARTS)
    return Model(f"{part * PARTS:,} parameters", f"a number, in {PARTS} equal parts", (((part,),),) * PARTS, part * PARTS)


def _read(path: Path) -> Config:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RefusedError(f"--model: {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise RefusedError(f"--model: {path} must hold a JSON object, as config.json does. Received: {type(config).__name__}.")
    return config


def _built(name: str, source: str, config: Config) -> Model:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise RefusedError(
            f"--model: the shapes of model_type {family!r} are not known, only those of {', '.join(FAMILIES)}. "
            "Pass its number of parameters instead, such as --model 7e9."
        )
    try:
        groups, idle = FAMILIES[family](_Fields(config))
    except KeyError as missing:
        raise RefusedError(f"--model: {source} lacks {missing}, which says shapes of {family}.") from missing
    made = Model(name, source, groups, 0)
    return made._replace(active=made.parameters - idle)


class _Fields:
    """A configuration's numbers, checked as they are read."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __call__(self, name: str, default: int | None = None) -> int:
        value = self._config.get(name) if default is not None else self._config[name]
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 1 << 32:
            raise RefusedError(f"--model: {name} must be an int above 0. Received: {value!r}.")
        return value

    def has(self, name: str, default: bool = False) -> bool:
        """Whether a field is set, or true."""
        return bool(self._config.get(name, default))


Groups = tuple[tuple[Shape, ...], ...]
Built = tuple[Groups, int]  # the variables; how many parameters belong to experts that a token is not sent to


def _gpt2(field: _Fields) -> Built:
    width, vocabulary = field("n_embd"), field("vocab_size")
    inner = field("n_inner", 4 * width)
    vector = ((width,),)
    layer = (*vector * 4, (width, 3 * width), (3 * width,), (width, width), *vector, (width, inner), (inner,), (inner, width), *vector)
    embedding = ((vocabulary, width), (field("n_positions"), width))
    return (embedding, *((layer,) * field("n_layer")), vector * 2), 0


def _mlp(width: int, inner: int) -> tuple[Shape, ...]:
    """Gate, up and down."""
    return ((inner, width), (inner, width), (width, inner))


def _around(field: _Fields, layers: Groups) -> Groups:
    """Embedding and head around layers."""
    table = (field("vocab_size"), field("hidden_size"))
    tied = field.has("tie_word_embeddings")
    return ((table,), *layers, ((field("hidden_size"),), *(() if tied else (table,))))


def _attention(field: _Fields) -> tuple[Shape, ...]:
    """Queries, keys, values and output, with the two norms of a layer."""
    width, heads = field("hidden_size"), field("num_attention_heads")
    each = field("head_dim", width // heads)
    q, kv = heads * each, field("num_key_value_heads", heads) * each
    every = field.has("attention_bias")
    biases = ((q,), (kv,), (kv,)) if every or field.has("qkv_bias") else ()
    return ((q, width), (kv, width), (kv, width), (width, q), *biases, *(((width,),) if every else ()), (width,), (width,))


def _llama(field: _Fields) -> Built:
    if field.has("mlp_bias"):
        raise RefusedError("--model: biases in the layers' feed-forward parts (mlp_bias) are not known here. Pass a number of parameters.")
    layer = (*_attention(field), *_mlp(field("hidden_size"), field("intermediate_size")))
    return _around(field, (layer,) * field("num_hidden_layers")), 0


def _qwen2(field: _Fields) -> Built:
    return _llama(_Fields({**field._config, "qkv_bias": True, "attention_bias": False}))


def _mixtral(field: _Fields) -> Built:
    width, inner, experts = field("hidden_size"), field("intermediate_size"), field("num_local_experts")
    layer = (*_attention(field), (experts, width), *(_mlp(width, inner) * experts))
    layers = field("num_hidden_layers")
    return _around(field, (layer,) * layers), layers * (experts - field("num_experts_per_tok")) * 3 * width * inner


def _latent_attention(field: _Fields) -> tuple[Shape, ...]:
    """DeepSeek-V2's: keys and values of all heads from one short vector."""
    width, heads, rank = field("hidden_size"), field("num_attention_heads"), field("kv_lora_rank")
    rope, nope, value = field("qk_rope_head_dim"), field("qk_nope_head_dim"), field("v_head_dim")
    q: tuple[Shape, ...] = ((heads * (nope + rope), width),)
    if field.has("q_lora_rank"):
        short = field("q_lora_rank")
        q = ((short, width), (short,), (heads * (nope + rope), short))
    kv = ((rank + rope, width), (rank,), (heads * (nope + value), rank))
    return (*q, *kv, (width, heads * value), (width,), (width,))


def _deepseek_v2(field: _Fields) -> Built:
    width, inner, experts = field("hidden_size"), field("moe_intermediate_size"), field("n_routed_experts")
    dense, layers = field("first_k_dense_replace"), field("num_hidden_layers")
    attention = _latent_attention(field)
    first = (*attention, *_mlp(width, field("intermediate_size")))
    shared = _mlp(width, inner * field("n_shared_experts"))
    layer = (*attention, (experts, width), *shared, *(_mlp(width, inner) * experts))
    idle = (layers - dense) * (experts - field("num_experts_per_tok")) * 3 * width * inner
    return _around(field, (first,) * dense + (layer,) * (layers - dense)), idle


FAMILIES: dict[str, Callable[[_Fields], Built]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "mixtral": _mixtral,
    "deepseek_v2": _deepseek_v2,
}
