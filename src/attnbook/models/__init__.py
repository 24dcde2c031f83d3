"""Models: one family a file, built from :mod:`attnbook.layers`."""

from attnbook.models.decoder import Decoder, DecoderConfig
from attnbook.models.generation import generate, greedy_decode
from attnbook.models.lstm import LSTMLanguageModel
from attnbook.models.ngram import KneserNey
from attnbook.models.rnn_seq2seq import RNNSeq2Seq
from attnbook.models.transformer import Transformer

__all__ = [
    "Decoder",
    "DecoderConfig",
    "KneserNey",
    "LSTMLanguageModel",
    "RNNSeq2Seq",
    "Transformer",
    "generate",
    "greedy_decode",
]
