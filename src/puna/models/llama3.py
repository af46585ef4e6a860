"""Llama 3 (April 2024), 3.1 (July 2024), 3.2 text (September 2024) and 3.3 (December 2024).

Grattafiori et al. 2024, "The Llama 3 Herd of Models". New since Llama 2: a tiktoken vocabulary of 128,256, rope's base
500,000, eight key/value heads in every size, 8,192 tokens of context. 3.1 stretches rope to 131,072 tokens
(`rope.Llama3Scaling`, factor 8) and adds the 405B. 3.2 adds 1B and 3B, pruned and distilled from 3.1, with factor 32
and the embedding used again as the head. 3.3 is the 70B of 3.1, trained further.
What is surprising: nothing in a file tells a 3.3 from a 3.1, and nothing needs to.
"""

from __future__ import annotations

from puna.models.rope import Llama3Scaling

VOCAB_SIZE = 128256
ROPE_THETA = 500_000.0
CONTEXT_3 = 8192
CONTEXT_3_1 = 131072
SCALING_3_1 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
SCALING_3_2 = Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)

SCALING_4 = Llama3Scaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_context=8192)
"""Llama 4 Scout's, by the same rule; it has no ramp."""

NARROWEST_3_1 = 4096
"""`dim` of the smallest 3.1 (8B): scaled-rope models narrower than this are 3.2's 1B and 3B."""
