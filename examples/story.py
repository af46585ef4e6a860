"""Have the embedded model write a story, as it comes."""

from puna import LLM

stream = LLM("cria").stream("Once upon a time", seed=7, max_tokens=120)
for text in stream:
    print(text, end="", flush=True)
answer = stream.answer
print(f"\n\n[{answer.completion_tokens} tokens, ended by: {answer.finish_reason}]")
