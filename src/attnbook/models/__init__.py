"""Models: one family a file, built from :mod:`attnbook.layers`."""

from attnbook.models.beam import Beams, beam_decode, beam_search
from attnbook.models.decoder import Decoder, DecoderConfig
from attnbook.models.decoding import Decoding
from attnbook.models.encoder import Encoder, EncoderConfig, MaskedLanguageHead, mean_pool
from attnbook.models.generation import generate, greedy_decode, stream
from attnbook.models.lstm import LSTMLanguageModel
from attnbook.models.ngram import KneserNey
from attnbook.models.rnn_seq2seq import RNNSeq2Seq
from attnbook.models.speculative import accept, speculate
from attnbook.models.speech import SpeechConfig, SpeechTransformer
from attnbook.models.transformer import Transformer

__all__ = [
    "Beams",
    "Decoder",
    "DecoderConfig",
    "Decoding",
    "Encoder",
    "EncoderConfig",
    "KneserNey",
    "LSTMLanguageModel",
    "MaskedLanguageHead",
    "RNNSeq2Seq",
    "SpeechConfig",
    "SpeechTransformer",
    "Transformer",
    "accept",
    "beam_decode",
    "beam_search",
    "generate",
    "greedy_decode",
    "mean_pool",
    "speculate",
    "stream",
]
