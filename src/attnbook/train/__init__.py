"""Training: one loop, its schedules, losses and checkpoints; Hugging Face Accelerate where it is asked for."""

from attnbook.train.batches import Shuffled, Windows
from attnbook.train.callbacks import Callback, JSONLines, Progress, Record, TensorBoard
from attnbook.train.checkpoints import CheckpointError, Checkpoints, CheckpointWarning
from attnbook.train.groups import EMA, parameter_groups
from attnbook.train.loop import History, NonFiniteLoss, fit
from attnbook.train.losses import next_token_loss, sequence_loss, token_loss
from attnbook.train.mup import mup_groups, mup_start
from attnbook.train.schedules import SCHEDULES, schedule

__all__ = [
    "EMA",
    "SCHEDULES",
    "Callback",
    "CheckpointError",
    "CheckpointWarning",
    "Checkpoints",
    "History",
    "JSONLines",
    "NonFiniteLoss",
    "Progress",
    "Record",
    "Shuffled",
    "TensorBoard",
    "Windows",
    "fit",
    "mup_groups",
    "mup_start",
    "next_token_loss",
    "parameter_groups",
    "schedule",
    "sequence_loss",
    "token_loss",
]
