"""Sound as a model sees it: log-mel spectrograms."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from attnbook.shapes import check_count, check_tensor, mismatch

RATE = 16_000  # samples a second
WINDOW, HOP = 400, 160  # samples: 25 ms and 10 ms


def _mel(hertz: Tensor) -> Tensor:
    """Slaney's scale: linear below 1 kHz, logarithmic above."""
    step = torch.log(torch.tensor(6.4, dtype=torch.float64)) / 27
    return torch.where(hertz < 1000, hertz * 3 / 200, 15 + torch.log(hertz.clamp(min=1000) / 1000) / step)


def _hertz(mel: Tensor) -> Tensor:
    step = torch.log(torch.tensor(6.4, dtype=torch.float64)) / 27
    return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel.clamp(min=15) - 15) * step))


@cache
def mel_filters(channels: int) -> Tensor:
    """Return triangular filters, equally spaced in mel and of equal area.

    Args:
        channels: number of filters between 0 and 8 kHz.
    Returns:
        (channels, 201) float32: weights of the frequencies of a 400-sample window.
    Raises:
        ValueError: channels below 1.
    """
    check_count("channels", channels)
    frequencies = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    top = _mel(torch.tensor([RATE / 2], dtype=torch.float64)).item()
    edges = _hertz(torch.linspace(0, top, channels + 2, dtype=torch.float64))
    left, middle, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - left) / (middle - left), (right - frequencies) / (right - middle)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (right - left)).float()


def log_mel(samples: Tensor, *, channels: int = 80, seconds: float | None = 30.0) -> Tensor:
    """Turn sound into a log-mel spectrogram ({cite}`radford2023`, §2.2).

    Power spectra of 25 ms windows every 10 ms, summed in mel filters; log₁₀, floored at 8 below the loudest, then
    shifted and divided by 4, so that values lie between about −1 and 1.

    Args:
        samples: (…, n) float in [−1, 1], 16,000 a second.
        channels: number of mel filters.
        seconds: pad with silence, or cut, to this length; None keeps the length.
    Returns:
        (…, channels, n / 160) float32.
    Raises:
        ValueError: no floating tensor, an empty one, channels below 1.
    """
    samples = check_tensor("samples", samples, "... n").float()
    if seconds is not None:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise mismatch("seconds", "a number > 0, or None", seconds)
        wanted = round(seconds * RATE)
        samples = torch.nn.functional.pad(samples[..., :wanted], (0, max(wanted - samples.shape[-1], 0)))
    flat = samples.reshape(-1, samples.shape[-1])
    spectra = torch.stft(flat, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True)[..., :-1]
    power = mel_filters(channels) @ spectra.abs().square()
    logarithm = power.clamp(min=1e-10).log10()
    loudest = logarithm.amax((-2, -1), keepdim=True)
    scaled = (torch.maximum(logarithm, loudest - 8) + 4) / 4
    return scaled.view(*samples.shape[:-1], *scaled.shape[-2:])
