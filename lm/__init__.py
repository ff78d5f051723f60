"""A small pure Mamba-2 language model, from text to weights, on two CPU cores.

documents.py  text files → cleaned documents, without the questions that models are tested on
corpus.py     documents → tokenizer → tokens for training, validation and test
answers.py    a larger model's answers to questions, as more text
forward.py    the model's forward pass and loss for training: start here
train.py      the training
baselines.py  how well a 5-gram model and xz predict the same text
evaluate.py   bits per byte, samples
"""

import os

# A thread of GNU's OpenMP waits at full speed for the others. Where another program keeps one of them from running, it
# waits about six milliseconds before it yields, hundreds of times a step. This variable shortens the wait. OpenMP reads it
# when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
