"""Ask a server with OpenAI's own client: text, a stream, JSON that keeps to a schema, embeddings, and a look inside.

headspring serve runs/quickstart
python examples/openai_client.py http://127.0.0.1:8000/v1
"""

import json
import os
import sys

from openai import OpenAI

address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
client = OpenAI(base_url=address, api_key=os.environ.get("HEADSPRING_API_KEY", "none-needed-here"))
model = client.models.list().data[0].id

# A text goes on. The same seed gives the same text, whatever else the server does.
answer = client.completions.create(model=model, prompt="def add(a, b):", max_tokens=24, temperature=0.8, seed=1)
print(repr(answer.choices[0].text), answer.choices[0].finish_reason, answer.usage.total_tokens)

# A conversation, piece by piece.
question = [{"role": "user", "content": "Which parameters does this function take?\n\ndef area(width, height): ..."}]
for chunk in client.chat.completions.create(model=model, messages=question, max_tokens=32, temperature=0, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

# An answer that must keep to a schema. It can only be cut (finish_reason "length"), never wrong.
properties = {"sure": {"enum": ["yes", "no"]}}
schema = {"type": "object", "properties": properties, "required": ["sure"], "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "opinion", "schema": schema, "strict": True}}
answer = client.chat.completions.create(model=model, messages=question, response_format=form, max_tokens=64)
print(json.loads(answer.choices[0].message.content))

# Vectors.
vectors = client.embeddings.create(model=model, input=["a function", "a class"])
print(len(vectors.data), "vectors of", len(vectors.data[0].embedding))

# What OpenAI has no word for goes into the body: here, what each layer would say already.
inside = {"lens": {"sites": [0, -1], "top": 3}}
answer = client.completions.create(model=model, prompt="import", max_tokens=1, temperature=0, extra_body=inside)
for site, rows in answer.choices[0].model_extra["inspection"]["lens"].items():
    print(site, [one["token"] for one in rows[-1]])
