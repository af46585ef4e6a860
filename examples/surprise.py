"""Which words of a text surprise the model? Logits of every position, from the same LLM that writes."""

import numpy as np

from puna import LLM

llm = LLM("cria")
text = "The little dog ran to the park and saw a big red ball."
ids = llm.encode(text)
logits = llm.logits(ids).astype(np.float64)
log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
for position, token in enumerate(ids[1:]):
    nats = -log_probability[position, token]
    print(f"{llm.tokenizer.decode([token])!r:12} {nats:5.2f} {'#' * round(4 * nats)}")
