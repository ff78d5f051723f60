"""A small pure Mamba-2 language model, from text to weights, on two CPU cores.

documents.py  text files → cleaned documents, without the questions that models are tested on
corpus.py     documents → tokenizer → tokens for training, validation and test
answers.py    a larger model's answers to questions, as more text
forward.py    the model's forward pass and loss for training: start here
train.py      plain training, and training for early exits
baselines.py  what a 5-gram model and xz make of the same text
evaluate.py   bits per byte at every depth, samples
"""

import os

# GNU's OpenMP has a thread wait about six milliseconds at full speed for one that another program keeps from running,
# hundreds of times a step, before it yields. It reads this when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
