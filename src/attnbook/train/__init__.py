"""Training: one loop on PyTorch and Hugging Face Accelerate, and learning-rate schedules."""

from attnbook.train.loop import History, NonFiniteLoss, fit
from attnbook.train.losses import sequence_loss, token_loss
from attnbook.train.schedules import SCHEDULES, schedule

__all__ = ["SCHEDULES", "History", "NonFiniteLoss", "fit", "schedule", "sequence_loss", "token_loss"]
