"""Llama 1 (February 2023; 7B, 13B, 33B, 65B): the page every later one differs from.

Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models". A decoder-only transformer with RMSNorm
before each block, SwiGLU of 8/3 · dim, rotary positions on queries and keys, as many key/value heads as heads, no
biases, its own output head, sentencepiece vocabulary of 32,000. The arithmetic is `decoder.py`; this page holds the
numbers its files leave out.
What is surprising: no chat format was ever published, and the 33B is called 30B in many file names.
"""

from __future__ import annotations

CONTEXT = 2048
ROPE_THETA = 10000.0
VOCAB_SIZE = 32000
