"""Models: one family a file, built from :mod:`attnbook.layers`."""

from attnbook.models.aurora import Aurora, AuroraConfig
from attnbook.models.beam import Beams, beam_decode, beam_search
from attnbook.models.captioner import Captioner, VisualQuestions
from attnbook.models.clip import CLIP, CLIPConfig, contrastive_loss
from attnbook.models.convnet import ConvNet, ConvNetConfig
from attnbook.models.correspondence import CorrespondenceConfig, CorrespondenceNetwork
from attnbook.models.decision import DecisionConfig, DecisionTransformer
from attnbook.models.decoder import Decoder, DecoderConfig
from attnbook.models.decoding import Decoding
from attnbook.models.encoder import Encoder, EncoderConfig, MaskedLanguageHead, mean_pool
from attnbook.models.galerkin_operator import GalerkinOperator, GalerkinOperatorConfig
from attnbook.models.generation import generate, greedy_decode, stream
from attnbook.models.graph import GAT, GATConfig, GraphTransformer, GraphTransformerConfig
from attnbook.models.listen_attend_spell import CTCRecogniser, ListenAttendSpell, ListenerConfig
from attnbook.models.lstm import LSTMLanguageModel
from attnbook.models.memory_network import MemoryNetwork, MemoryNetworkConfig
from attnbook.models.neural_process import NeuralProcess, NeuralProcessConfig
from attnbook.models.ngram import KneserNey
from attnbook.models.patch_series import PatchTST, PatchTSTConfig
from attnbook.models.perceiver import Perceiver, PerceiverConfig
from attnbook.models.recurrent_memory import RecurrentMemoryConfig, RecurrentMemoryTransformer
from attnbook.models.rnn_seq2seq import RNNSeq2Seq
from attnbook.models.scaffolding import ScaffoldingConfig, ScaffoldingNetwork
from attnbook.models.speculative import accept, speculate
from attnbook.models.speech import SpeechConfig, SpeechTransformer
from attnbook.models.swin import Swin, SwinConfig
from attnbook.models.t5 import T5, T5Config
from attnbook.models.transformer import Transformer
from attnbook.models.vision import VisionConfig, VisionTransformer

__all__ = [
    "CLIP",
    "GAT",
    "T5",
    "Aurora",
    "AuroraConfig",
    "Beams",
    "CLIPConfig",
    "CTCRecogniser",
    "Captioner",
    "ConvNet",
    "ConvNetConfig",
    "CorrespondenceConfig",
    "CorrespondenceNetwork",
    "DecisionConfig",
    "DecisionTransformer",
    "Decoder",
    "DecoderConfig",
    "Decoding",
    "Encoder",
    "EncoderConfig",
    "GATConfig",
    "GalerkinOperator",
    "GalerkinOperatorConfig",
    "GraphTransformer",
    "GraphTransformerConfig",
    "KneserNey",
    "LSTMLanguageModel",
    "ListenAttendSpell",
    "ListenerConfig",
    "MaskedLanguageHead",
    "MemoryNetwork",
    "MemoryNetworkConfig",
    "NeuralProcess",
    "NeuralProcessConfig",
    "PatchTST",
    "PatchTSTConfig",
    "Perceiver",
    "PerceiverConfig",
    "RNNSeq2Seq",
    "RecurrentMemoryConfig",
    "RecurrentMemoryTransformer",
    "ScaffoldingConfig",
    "ScaffoldingNetwork",
    "SpeechConfig",
    "SpeechTransformer",
    "Swin",
    "SwinConfig",
    "T5Config",
    "Transformer",
    "VisionConfig",
    "VisionTransformer",
    "VisualQuestions",
    "accept",
    "beam_decode",
    "beam_search",
    "contrastive_loss",
    "generate",
    "greedy_decode",
    "mean_pool",
    "speculate",
    "stream",
]
