"""Decisions as sequence modelling: the Decision Transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnbook.layers import TransformerBlock, make_norm
from attnbook.models.count import block, linear
from attnbook.shapes import check_count, check_mask, check_probability, check_tensor, mismatch


@dataclass(frozen=True)
class DecisionConfig:
    """The shape of a :class:`DecisionTransformer`.

    Attributes:
        state_dim: numbers that describe a state.
        action_dim: numbers that describe an action, or how many actions there are to choose from.
        context_length: the most steps that the model sees at once.
        max_steps: the most steps of an episode.
        width: E.
        depth: number of blocks.
        num_heads: H.
        hidden: width of the feed-forward networks; 4E by default.
        discrete: actions are chosen from a list rather than given by numbers.
        dropout: of the tokens, the weights and what each part adds.
    """

    state_dim: int
    action_dim: int
    context_length: int
    max_steps: int
    width: int
    depth: int
    num_heads: int
    hidden: int | None = None
    discrete: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("state_dim", "action_dim", "context_length", "max_steps", "width", "depth", "num_heads"):
            check_count(name, getattr(self, name))
        check_probability("dropout", self.dropout)

    def num_parameters(self) -> int:
        """Count the parameters by formula."""
        E = self.width
        tokens = linear(1, E) + linear(self.state_dim, E) + linear(self.action_dim, E, bias=not self.discrete)
        norms = 4 * E  # of the tokens, and after the last block
        return tokens + self.max_steps * E + norms + self.depth * block(E, self.hidden) + linear(E, self.action_dim)


class DecisionTransformer(nn.Module):
    """Predict actions from the return that is wanted, and from states and actions so far ({cite}`chen2021`).

    Every step is three tokens: the return still to come, the state, the action. A causal Transformer reads them; the
    action is read off the state's token. To act, ask for a return, and subtract each reward as it comes. Differs from
    the paper: numbers that describe an action are not squashed by a tanh, so that they need not lie in [−1, 1].

    Args:
        config: its shape.
    Raises:
        ValueError: a shape that is impossible.
    """

    def __init__(self, config: DecisionConfig):
        super().__init__()
        self.config = config
        E = config.width
        self.embed_return = nn.Linear(1, E)
        self.embed_state = nn.Linear(config.state_dim, E)
        self.embed_action = nn.Embedding(config.action_dim, E) if config.discrete else nn.Linear(config.action_dim, E)
        self.step = nn.Embedding(config.max_steps, E)
        self.token_norm = make_norm("layer", E)
        self.blocks = nn.ModuleList(
            TransformerBlock(E, config.num_heads, hidden=config.hidden, dropout=config.dropout)
            for _ in range(config.depth)
        )
        self.norm = make_norm("layer", E)
        self.output = nn.Linear(E, config.action_dim)
        self.dropout = nn.Dropout(config.dropout)
        for table in (self.step, self.embed_action) if config.discrete else (self.step,):
            nn.init.normal_(table.weight, std=0.02)

    def _check(self, returns: Tensor, states: Tensor, actions: Tensor, steps: Tensor) -> None:
        config = self.config
        batch, length = check_tensor("returns", returns, "B K").shape
        if length > config.context_length:
            raise mismatch("returns", f"at most {config.context_length} steps on axis 1", returns)
        for name, tensor, last in (("states", states, config.state_dim), ("actions", actions, config.action_dim)):
            if name == "actions" and config.discrete:
                check_tensor(name, tensor, "B K", dtypes=(torch.int64, torch.int32))
                wanted = (batch, length)
            else:
                check_tensor(name, tensor, "B K D")
                wanted = (batch, length, last)
            if tensor.shape != wanted:
                raise mismatch(name, f"shape {wanted}", tensor)
        if check_tensor("steps", steps, "B K", dtypes=(torch.int64, torch.int32)).shape != (batch, length):
            raise mismatch("steps", f"shape {(batch, length)}", steps)

    def forward(
        self, returns: Tensor, states: Tensor, actions: Tensor, steps: Tensor, *, mask: Tensor | None = None
    ) -> Tensor:
        """Predict the action at each step, given everything before it.

        Args:
            returns: (B, K), the sum of rewards from this step to the end.
            states: (B, K, state_dim).
            actions: (B, K, action_dim), or (B, K) integers where they are chosen from a list; the last one is not seen
                by any prediction.
            steps: (B, K) integers below max_steps, counted from an episode's beginning.
            mask: (B, K) bool, True at real steps; padding stands in front. All of them by default.
        Returns:
            (B, K, action_dim): actions, or unnormalised log-probabilities of them.
        Raises:
            ValueError: shapes that do not match, more steps than the context length.
        """
        self._check(returns, states, actions, steps)
        batch, length = returns.shape
        when = self.step(steps)
        tokens = (self.embed_return(returns[..., None]), self.embed_state(states), self.embed_action(actions))
        x = torch.stack([token + when for token in tokens], 2).flatten(1, 2)  # (B, 3K, E)
        x = self.dropout(self.token_norm(x))
        if mask is not None:
            mask = check_mask("mask", mask, (batch, length), "B K").expand(batch, length)
            mask = mask.repeat_interleave(3, 1)[:, None, None]  # (B, 1, 1, 3K)
        for layer in self.blocks:
            x = layer(x, attn_mask=mask, is_causal=True)
        return self.output(self.norm(x[:, 1::3]))
