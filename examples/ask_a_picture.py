"""Teach a decoder to look: train a vision tower and a small decoder on scikit-learn's digits, then ask about unseen ones.

python examples/ask_a_picture.py [steps]          # about a minute on one core
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from headspring.data.media import digits
from headspring.data.multimodal import example, join_examples
from headspring.data.rows import Rows
from headspring.inference.multimodal import answer
from headspring.models import Attention, Block, Decoder, Full, Multimodal, NoPE, SwiGLU, Vision, repeat
from headspring.tokenization.train import TokenizerConfig, train_tokenizer
from headspring.training.config import TrainConfig
from headspring.training.loop import train
from headspring.training.multimodal import Answers
from headspring.training.optimizers import AdamW

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
QUESTIONS = {"which digit is this?": lambda digit: NAMES[digit], "is it even?": lambda digit: "no" if digit % 2 else "yes"}

# Words come from a tokenizer like any other's; the placeholder of a picture's patches is one token more.
tokenizer = train_tokenizer([*QUESTIONS, *NAMES, "yes", "no"] * 4, TokenizerConfig(vocab_size=300))
placeholder = tokenizer.vocab_size

look = Block(mixer=Attention(heads=4, position=NoPE(), mask=Full()), feedforward=SwiGLU(hidden=160))
write = Block(mixer=Attention(heads=4), feedforward=SwiGLU(hidden=160))
tower = Vision(placeholder=placeholder, height=8, columns=8, patch=2, width=64, blocks=repeat(2, look))
decoder = Decoder(vocab=tokenizer.vocab_size + 1, width=64, layers=repeat(2, write), context=48)
model = Multimodal(decoder=decoder, towers={"image": tower}).build()
print(model, end="\n\n")


def prompt(question: str) -> list[int]:
    return [tokenizer.bos_id, *[placeholder] * tower.num_pieces, *tokenizer.encode(question)]


seen, unseen = digits()
rows = [
    example(prompt(question), [*tokenizer.encode(reply(digit)), tokenizer.eos_id], {"image": picture[None, None]})
    for picture, digit in zip(seen.pictures, seen.labels)
    for question, reply in QUESTIONS.items()
]
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 600
config = TrainConfig(steps=steps, batch_size=32, precision="fp32", compile="never", optimizer=AdamW(learning_rate=0.003))
with tempfile.TemporaryDirectory() as folder:
    train(model, Answers(), Rows(rows, join_examples, decoder.context), config, Path(folder))

shown = [{"image": picture[None, None]} for picture in unseen.pictures]
for question, reply in QUESTIONS.items():
    prompts = [np.array(prompt(question))] * len(shown)
    said = [tokenizer.decode(ids) for ids in answer(model, prompts, shown, max_tokens=8, end=tokenizer.eos_id)]
    right = np.mean([text == reply(digit) for text, digit in zip(said, unseen.labels)])
    print(f"{question:22} {right:.1%} right of {len(said)} unseen pictures; the first three: {', '.join(said[:3])}")
