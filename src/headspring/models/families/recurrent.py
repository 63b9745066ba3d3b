"""What came before attention: the neural n-gram model, and recurrent networks from the simple RNN on."""

from headspring.models.block import Block, Branch, repeat
from headspring.models.decoder import Decoder
from headspring.models.families.registry import family
from headspring.models.feedforward import MLP
from headspring.models.neural_ngram import NeuralNGram
from headspring.models.recurrent import GRU, LSTM, RNN


@family("rnn")
def rnn() -> Decoder:
    """Mikolov et al. 2010: one simple recurrent layer that replaces the stream."""
    block = Block(mixer=Branch(f=RNN(), pre=None, residual=False))
    return Decoder(vocab=53, width=24, layers=(block,), context=48, norm=None, tied=False)


@family("lstm")
def lstm() -> Decoder:
    """Zaremba et al. (arXiv 1409.2329): two layers of LSTM, each with a memory wider than the stream."""
    block = Block(mixer=Branch(f=LSTM(hidden=20), pre=None, residual=False))
    return Decoder(vocab=53, width=24, layers=repeat(2, block), context=48, tied=False)


@family("gru")
def gru() -> Decoder:
    """What a recurrent net is in today's blocks: pre-norm branches, a feed-forward, gradients cut every 10 tokens."""
    block = Block(mixer=GRU(hidden=16, truncate=10), feedforward=MLP(hidden=40))
    return Decoder(vocab=53, width=24, layers=repeat(2, block), context=48)


@family("neural_ngram")
def neural_ngram() -> Decoder:
    """Bengio et al. 2003: one window of three tokens, tanh, and the direct connection."""
    block = Block(mixer=Branch(f=NeuralNGram(order=4, hidden=40, direct=True), pre=None, residual=False))
    return Decoder(vocab=53, width=24, layers=(block,), context=48, norm=None, tied=False)
