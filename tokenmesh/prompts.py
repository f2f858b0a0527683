"""Checks of prompts that every service makes before it spends anything on them."""

from __future__ import annotations

from collections.abc import Sequence

from tokenmesh.rpc.errors import Reason, invalid


def check_prompt(token_ids: Sequence[int], vocab_size: int, max_model_len: int, room: int) -> None:
    """Refuses prompts the model cannot take; `room` tokens must fit behind the prompt.

    Raises MeshError: INVALID_ARGUMENT (EMPTY_PROMPT, PROMPT_TOO_LONG, TOKEN_OUT_OF_VOCABULARY).
    """
    if not token_ids:
        raise invalid(Reason.EMPTY_PROMPT, "the prompt has no tokens", param="prompt_token_ids")
    if len(token_ids) + room > max_model_len:
        raise invalid(
            Reason.PROMPT_TOO_LONG,
            f"{len(token_ids)} tokens of prompt and {room} to come are more than the {max_model_len} of a sequence",
            param="prompt_token_ids",
        )
    worst = max(token_ids)
    if worst >= vocab_size:
        raise invalid(
            Reason.TOKEN_OUT_OF_VOCABULARY,
            f"token id {worst} is outside the vocabulary of {vocab_size}",
            param="prompt_token_ids",
        )
