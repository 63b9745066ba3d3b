"""Ask a model: continue text, stream, chat, and see how sure it was of each token.

python examples/generate.py runs/quickstart
"""

import sys

import headspring as hs

lm = hs.load(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
print(lm, end="\n\n")

# Several prompts share a batch; temperature 0 takes the most likely token.
for answer in lm.generate(["def add(a, b):", "import os\n"], max_tokens=24, temperature=0.0):
    print(repr(answer.text), answer.finish_reason)

# The same seed gives the same text, piece by piece.
for piece in lm.stream("class Point:", max_tokens=40, temperature=0.8, top_p=0.95, seed=1):
    print(piece, end="", flush=True)
print("\n")

question = [{"role": "user", "content": "Which parameters does this function take?\n\ndef area(width, height): ..."}]
print(lm.chat(question, max_tokens=32, temperature=0.0).text, end="\n\n")

# Natural log-probability of every token of a text.
text = "for i in range(10):"
for token, log_prob in zip(lm.tokenizer.encode(text), lm.logprobs(text)[0], strict=True):
    print(f"{log_prob:8.3f}  {lm.tokenizer.decode([token])!r}")
