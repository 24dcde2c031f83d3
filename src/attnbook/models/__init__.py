"""Models: one family a file, built from :mod:`attnbook.layers`."""

from attnbook.models.captioner import Captioner, VisualQuestions
from attnbook.models.clip import CLIP, CLIPConfig, contrastive_loss
from attnbook.models.convnet import ConvNet, ConvNetConfig
from attnbook.models.decoder import Decoder, DecoderConfig
from attnbook.models.encoder import Encoder, EncoderConfig, MaskedLanguageHead, mean_pool
from attnbook.models.generation import generate, greedy_decode
from attnbook.models.lstm import LSTMLanguageModel
from attnbook.models.ngram import KneserNey
from attnbook.models.perceiver import Perceiver, PerceiverConfig
from attnbook.models.rnn_seq2seq import RNNSeq2Seq
from attnbook.models.speech import SpeechConfig, SpeechTransformer
from attnbook.models.swin import Swin, SwinConfig
from attnbook.models.t5 import T5, T5Config
from attnbook.models.transformer import Transformer
from attnbook.models.vision import VisionConfig, VisionTransformer

__all__ = [
    "CLIP",
    "T5",
    "CLIPConfig",
    "Captioner",
    "ConvNet",
    "ConvNetConfig",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "KneserNey",
    "LSTMLanguageModel",
    "MaskedLanguageHead",
    "Perceiver",
    "PerceiverConfig",
    "RNNSeq2Seq",
    "SpeechConfig",
    "SpeechTransformer",
    "Swin",
    "SwinConfig",
    "T5Config",
    "Transformer",
    "VisionConfig",
    "VisionTransformer",
    "VisualQuestions",
    "contrastive_loss",
    "generate",
    "greedy_decode",
    "mean_pool",
]
