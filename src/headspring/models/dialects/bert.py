"""BERT (arXiv 1810.04805), RoBERTa (1907.11692) and XLM-RoBERTa (1911.02116), each with its head or bare.

| architecture | positions | types | over the last state |
| --- | --- | --- | --- |
| `BertForMaskedLM` | from row 0 | usually 2 | dense, activation, norm, tied matrix, bias |
| `RobertaForMaskedLM`, `XLMRobertaForMaskedLM` | from row pad + 1 | usually 1 | the same under other names, always with gelu |
| `BertModel`, `RobertaModel`, `XLMRobertaModel` | | | the pooler: how embedding models are usually saved |

All are post-norm with biases everywhere. A decoder matrix of its own (`tie_word_embeddings: false`) is refused: in
`transformers` such a model holds two biases, of which it uses one.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from headspring.artifacts.errors import UserError
from headspring.models.attention import Attention
from headspring.models.block import Block, Branch, repeat
from headspring.models.dialects.registry import Dialect, Settings, dialect
from headspring.models.dialects.rules import Rule, expand
from headspring.models.embedding import Embed, Head
from headspring.models.encoder import Encoder
from headspring.models.feedforward import MLP
from headspring.models.mask import Full
from headspring.models.model import Model
from headspring.models.norm import LayerNorm
from headspring.models.position import Learned, NoPE
from headspring.models.transform import Transform

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}
PARTS = ("weight", "bias")


def pairs(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The rules of a weight and its bias."""
    return tuple(Rule(f"{theirs}.{part}", f"{ours}.{part}") for part in PARTS)


LAYER = "encoder.layer.{i}."
BODY = (
    Rule("embeddings.word_embeddings.weight", "embed.weight"),
    Rule("embeddings.position_embeddings.weight", "embed.positions.weight"),
    Rule("embeddings.token_type_embeddings.weight", "embed.types.weight"),
    *pairs("embeddings.LayerNorm", "embed.norm"),
    *pairs(LAYER + "attention.self.query", "layers.{i}.mixer.f.q"),
    *pairs(LAYER + "attention.self.key", "layers.{i}.mixer.f.k"),
    *pairs(LAYER + "attention.self.value", "layers.{i}.mixer.f.v"),
    *pairs(LAYER + "attention.output.dense", "layers.{i}.mixer.f.out"),
    *pairs(LAYER + "attention.output.LayerNorm", "layers.{i}.mixer.out"),
    *pairs(LAYER + "intermediate.dense", "layers.{i}.feedforward.f.up"),
    *pairs(LAYER + "output.dense", "layers.{i}.feedforward.f.out"),
    *pairs(LAYER + "output.LayerNorm", "layers.{i}.feedforward.out"),
)
POOLER = pairs("pooler.dense", "pooler")


class BertLine(Dialect):
    """What they have in common. `stem` stands before the names of the body; `over` are the tensors over the last state."""

    stem: ClassVar[str] = ""
    over: ClassVar[tuple[Rule, ...]] = POOLER
    tied_copies: ClassVar[Mapping[str, str]] = {}
    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    fixed: ClassVar[Mapping[str, Any]] = {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    ignored: ClassVar[tuple[str, ...]] = ("*.position_ids",)

    def model(self, config: Settings) -> Encoder:
        norm, offset = LayerNorm(epsilon=config["layer_norm_eps"]), self.offset(config)
        attention = Attention(
            heads=config["num_attention_heads"], position=NoPE(), mask=Full(), qk_norm=None, bias=True, out_bias=True
        )
        feedforward = MLP(hidden=config["intermediate_size"], activation=self.activation(config), bias=True)
        block = Block(mixer=Branch(f=attention, pre=None, out=norm), feedforward=Branch(f=feedforward, pre=None, out=norm))
        return Encoder(
            vocab=config["vocab_size"],
            width=config["hidden_size"],
            layers=repeat(config.count("num_hidden_layers"), block),
            context=config["max_position_embeddings"] - offset,
            norm=None,
            embed=Embed(positions=Learned(offset=offset), types=config["type_vocab_size"], norm=norm),
            head=self.head(config, norm),
            pooler=self.over is POOLER,
        )

    def offset(self, config: Settings) -> int:
        """The row of the first position."""
        return 0

    def activation(self, config: Settings) -> Any:
        name = config["hidden_act"]
        if name not in ACTIVATIONS:
            raise UserError(f"config.json: hidden_act = {name!r} is not supported; those that are: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def head(self, config: Settings, norm: LayerNorm) -> Head | None:
        return None

    def config(self, model: Model) -> dict[str, Any]:
        """The first layer speaks for all."""
        model = self.part(model, Encoder, "the model")
        attention = self.part(model.layers[0].mixer.f, Attention, "layers.0.mixer.f")
        branch = self.part(model.layers[0].feedforward, Branch, "layers.0.feedforward")
        feedforward = self.part(branch.f, MLP, "layers.0.feedforward.f")
        positions = self.part(model.embed.positions, Learned, "embed.positions")
        names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        if feedforward.activation not in names:
            raise UserError(f"{self.architecture} has no word for the activation {feedforward.activation!r}")
        return {
            "vocab_size": model.vocab,
            "hidden_size": model.width,
            "num_hidden_layers": len(model.layers),
            "num_attention_heads": attention.heads,
            "intermediate_size": feedforward.hidden,
            "hidden_act": names[feedforward.activation],
            "max_position_embeddings": model.context + positions.offset,
            "type_vocab_size": max(1, model.embed.types),
            "layer_norm_eps": self.part(model.embed.norm, LayerNorm, "embed.norm").epsilon,
            **self.offset_config(positions.offset),
        }

    def offset_config(self, offset: int) -> dict[str, Any]:
        return {}

    def rules(self, model: Model) -> Iterable[Rule]:
        assert isinstance(model, Encoder)
        body = (rule.prefixed(theirs=self.stem) for rule in BODY)
        return expand((*body, *self.over), len(model.layers))

    def copies(self, model: Model) -> Mapping[str, str]:
        """Besides what is tied, the names that norms had before 2019."""
        assert isinstance(model, Encoder)
        return {**self.tied_copies, **dict(_old_names(self.rules(model)))}


def _old_names(rules: Iterable[Rule]) -> Iterator[tuple[str, str]]:
    for rule in rules:
        for name in rule.theirs:
            for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
                if name.endswith(new):
                    yield name.removesuffix(new) + old, name


class FromPad(BertLine):
    """Positions that begin after the row of the pad."""

    defaults: ClassVar[Mapping[str, Any]] = {**BertLine.defaults, "pad_token_id": 1}

    def offset(self, config: Settings) -> int:
        return int(config["pad_token_id"]) + 1

    def offset_config(self, offset: int) -> dict[str, Any]:
        if offset < 1:
            raise UserError(f"{self.architecture} reads the first position from row pad + 1, never from row 0")
        return {"pad_token_id": offset - 1}


@dialect
class BertForMaskedLM(BertLine):
    architecture, model_type, stem = "BertForMaskedLM", "bert", "bert."
    over = (
        *pairs("cls.predictions.transform.dense", "transform.dense"),
        *pairs("cls.predictions.transform.LayerNorm", "transform.norm"),
        Rule("cls.predictions.bias", "head.bias"),
    )
    tied_copies = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    ignored = (*BertLine.ignored, "bert.pooler.*", "cls.seq_relationship.*")  # what this architecture does not use of a file

    def head(self, config: Settings, norm: LayerNorm) -> Head:
        return Head(bias=True, transform=Transform(activation=self.activation(config), norm=norm))


class RobertaHead(FromPad):
    """RoBERTa's names for the same head."""

    stem = "roberta."
    over = (
        *pairs("lm_head.dense", "transform.dense"),
        *pairs("lm_head.layer_norm", "transform.norm"),
        Rule("lm_head.bias", "head.bias"),
    )
    tied_copies = {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }
    ignored = (*BertLine.ignored, "roberta.pooler.*")

    def head(self, config: Settings, norm: LayerNorm) -> Head:
        return Head(bias=True, transform=Transform(activation="gelu", norm=norm))


@dialect
class RobertaForMaskedLM(RobertaHead):
    architecture, model_type = "RobertaForMaskedLM", "roberta"


@dialect
class XLMRobertaForMaskedLM(RobertaHead):
    architecture, model_type = "XLMRobertaForMaskedLM", "xlm-roberta"


@dialect
class BertModel(BertLine):
    architecture, model_type = "BertModel", "bert"


@dialect
class RobertaModel(FromPad):
    architecture, model_type = "RobertaModel", "roberta"


@dialect
class XLMRobertaModel(FromPad):
    architecture, model_type = "XLMRobertaModel", "xlm-roberta"
