"""ModernBERT (arXiv 2412.13663): an encoder with what decoders had learned since BERT.

Pre-norm, RoPE, GeGLU, hardly any biases, and attention that is global in every third layer and otherwise looks
`local_attention` / 2 tokens to either side, both ends included, with a rotation of its own base. The embedding is normed,
so that the first layer's attention has no norm of its own. Wqkv holds the rows of q, k and v one after another; Wi those of
the activated half, then those of the other.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from headspring.artifacts.errors import UserError
from headspring.models.attention import Attention
from headspring.models.block import Block, Branch
from headspring.models.dialects.bert import ACTIVATIONS
from headspring.models.dialects.registry import Dialect, Settings, dialect
from headspring.models.dialects.rules import Rule
from headspring.models.embedding import Embed, Head
from headspring.models.encoder import Encoder
from headspring.models.feedforward import Gated
from headspring.models.mask import Full
from headspring.models.model import Model
from headspring.models.norm import LayerNorm
from headspring.models.position import RoPE
from headspring.models.transform import Transform

GLOBAL, LOCAL = "full_attention", "sliding_attention"
OLD_THETAS = {GLOBAL: "global_rope_theta", LOCAL: "local_rope_theta"}


@dialect
class ModernBertForMaskedLM(Dialect):
    architecture, model_type, prefix = "ModernBertForMaskedLM", "modernbert", ""
    defaults = {
        "max_position_embeddings": 8192,
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "norm_eps": 1e-5,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160_000.0,
        "local_rope_theta": 10_000.0,
        "tie_word_embeddings": True,
    }

    def model(self, config: Settings) -> Encoder:
        norm = LayerNorm(epsilon=config["norm_eps"], bias=config["norm_bias"])
        feedforward = Gated(
            hidden=config["intermediate_size"],
            activation=_activation(config, "hidden_activation"),
            bias=config["mlp_bias"],
        )
        kinds = _layer_types(config)
        mixers = {kind: _attention(config, kind) for kind in set(kinds)}
        layers = [
            Block(mixer=Branch(f=mixers[kind], pre=norm if i else None), feedforward=Branch(f=feedforward, pre=norm))
            for i, kind in enumerate(kinds)
        ]
        transform = Transform(
            activation=_activation(config, "classifier_activation"), norm=norm, bias=config["classifier_bias"]
        )
        return Encoder(
            vocab=config["vocab_size"],
            width=config["hidden_size"],
            layers=tuple(layers),
            context=config["max_position_embeddings"],
            norm=norm,
            tied=config["tie_word_embeddings"],
            embed=Embed(norm=norm),
            head=Head(bias=config["decoder_bias"], transform=transform),
        )

    def config(self, model: Model) -> dict[str, Any]:
        """The first layer speaks for all, but for where they look."""
        model = self.part(model, Encoder, "the model")
        mixers = [self.part(block.mixer.f, Attention, "mixer.f") for block in model.layers]
        masks = [self.part(mixer.mask, Full, "mask") for mixer in mixers]
        branch = self.part(model.layers[0].feedforward, Branch, "layers.0.feedforward")
        feedforward = self.part(branch.f, Gated, "layers.0.feedforward.f")
        head = self.part(model.head, Head, "head")
        transform = self.part(head.transform, Transform, "head.transform")
        norm = self.part(model.norm, LayerNorm, "norm")
        windows = [mask.window for mask in masks if mask.window is not None]
        kinds = [GLOBAL if mask.window is None else LOCAL for mask in masks]
        positions = {kind: self.part(mixer.position, RoPE, "position") for kind, mixer in zip(kinds, mixers)}
        thetas = {kind: positions[kind].theta if kind in positions else self.defaults[old] for kind, old in OLD_THETAS.items()}
        return {
            "vocab_size": model.vocab,
            "hidden_size": model.width,
            "num_hidden_layers": len(model.layers),
            "num_attention_heads": mixers[0].heads,
            "intermediate_size": feedforward.hidden,
            "max_position_embeddings": model.context,
            "hidden_activation": _word(feedforward.activation),
            "classifier_activation": _word(transform.activation),
            "norm_eps": norm.epsilon,
            "norm_bias": norm.bias,
            "attention_bias": mixers[0].bias,
            "mlp_bias": feedforward.bias,
            "classifier_bias": transform.bias,
            "decoder_bias": head.bias,
            "tie_word_embeddings": model.tied,
            "layer_types": kinds,
            "local_attention": 2 * windows[0] if windows else self.defaults["local_attention"],
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
            **{OLD_THETAS[kind]: theta for kind, theta in thetas.items()},
        }

    def rules(self, model: Model) -> Iterable[Rule]:
        assert isinstance(model, Encoder) and model.head is not None and model.head.transform is not None
        mixer, feedforward = model.layers[0].mixer.f, model.layers[0].feedforward
        assert isinstance(mixer, Attention) and feedforward is not None and isinstance(feedforward.f, Gated)
        norms = _parts(isinstance(model.norm, LayerNorm) and model.norm.bias)
        yield Rule("model.embeddings.tok_embeddings.weight", "embed.weight")
        for part in norms:
            yield Rule(f"model.embeddings.norm.{part}", f"embed.norm.{part}")
            yield Rule(f"model.final_norm.{part}", f"norm.{part}")
            yield Rule(f"head.norm.{part}", f"transform.norm.{part}")
        for i in range(len(model.layers)):
            theirs, ours = f"model.layers.{i}.", f"layers.{i}."
            for part in norms:
                if i:
                    yield Rule(f"{theirs}attn_norm.{part}", f"{ours}mixer.pre.{part}")
                yield Rule(f"{theirs}mlp_norm.{part}", f"{ours}feedforward.pre.{part}")
            for part in _parts(mixer.bias):
                yield Rule(f"{theirs}attn.Wqkv.{part}", *(f"{ours}mixer.f.{x}.{part}" for x in "qkv"))
                yield Rule(f"{theirs}attn.Wo.{part}", f"{ours}mixer.f.out.{part}")
            for part in _parts(feedforward.f.bias):
                yield Rule(f"{theirs}mlp.Wi.{part}", f"{ours}feedforward.f.gate.{part}", f"{ours}feedforward.f.up.{part}")
                yield Rule(f"{theirs}mlp.Wo.{part}", f"{ours}feedforward.f.out.{part}")
        for part in _parts(model.head.transform.bias):
            yield Rule(f"head.dense.{part}", f"transform.dense.{part}")
        if not model.tied:
            yield Rule("decoder.weight", "head.weight")
        if model.head.bias:
            yield Rule("decoder.bias", "head.bias")

    def copies(self, model: Model) -> Mapping[str, str]:
        assert isinstance(model, Encoder)
        return {"decoder.weight": "model.embeddings.tok_embeddings.weight"} if model.tied else {}


def _parts(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _layer_types(config: Settings) -> list[str]:
    """Where each layer looks. Older files say every how many layers one is global."""
    count, every = config.count("num_hidden_layers"), config["global_attn_every_n_layers"]
    kinds = config.get("layer_types") or [LOCAL if i % every else GLOBAL for i in range(count)]
    if len(kinds) != count or set(kinds) - {GLOBAL, LOCAL}:
        raise UserError(f"config.json: layer_types must say {GLOBAL} or {LOCAL} for each of {count} layers")
    return kinds


def _attention(config: Settings, kind: str) -> Attention:
    return Attention(
        heads=config["num_attention_heads"],
        position=RoPE(theta=_theta(config, kind)),
        mask=Full(window=config["local_attention"] // 2 if kind == LOCAL else None),
        qk_norm=None,
        bias=config["attention_bias"],
        out_bias=config["attention_bias"],
    )


def _theta(config: Settings, kind: str) -> float:
    """The base of a kind of layer's rotation, from `rope_parameters` (transformers 5) or a key of its own (before it)."""
    rope = (config.get("rope_parameters") or {}).get(kind) or {}
    if config.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise UserError(f"config.json: the rotation of {kind} is scaled, which is not supported for ModernBERT")
    theta = rope.get("rope_theta", config[OLD_THETAS[kind]])
    return config[OLD_THETAS[GLOBAL]] if theta is None else theta


def _activation(config: Settings, key: str) -> Any:
    if config[key] not in ACTIVATIONS:
        raise UserError(f"config.json: {key} = {config[key]!r} is not supported; those that are: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[config[key]]


def _word(activation: str) -> str:
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if activation not in names:
        raise UserError(f"ModernBERT has no word for the activation {activation!r}")
    return names[activation]
