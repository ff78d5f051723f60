"""The library's own `generate` with exits in it."""

from __future__ import annotations

import pytest
import torch
import transformers

from helpers import modest_exits
from models import tiny
from offramp import Policy, decoding
from offramp.errors import BadInput, ExitsMismatch

TEXT = torch.tensor([[72, 101, 108, 108, 111]])


def generate(family: str, inputs: torch.Tensor = TEXT, streamer=None, seed: int = 0, **kwargs):
    settings = {"pad_token_id": 257, "max_new_tokens": 16, "attention_mask": (inputs != 257).long(), **kwargs}
    custom = decoding(modest_exits(family), Policy((0.3,) * 3), "verify", streamer=streamer)
    torch.manual_seed(seed)
    return tiny(family).model.generate(inputs, custom_generate=custom, streamer=streamer, **settings)


def library(family: str, inputs: torch.Tensor = TEXT, **kwargs):
    settings = {"pad_token_id": 257, "max_new_tokens": 16, "attention_mask": (inputs != 257).long(), **kwargs}
    return tiny(family).model.generate(inputs, do_sample=False, **settings)


class Banned(transformers.LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, ::3] = -torch.inf
        return scores


@pytest.mark.parametrize("family", ["llama/compiled", "mamba2/compiled", "jamba"])
def test_verified_generation_is_the_librarys(family: str) -> None:
    plain, penalty = library(family), library(family, repetition_penalty=1.5)
    assert torch.equal(generate(family), plain)
    assert torch.equal(generate(family, repetition_penalty=1.5), penalty)
    assert not torch.equal(plain, penalty)
    banned = transformers.LogitsProcessorList([Banned()])
    assert torch.equal(generate(family, logits_processor=banned), library(family, logits_processor=banned))
    end = int(plain[0, 9])
    assert torch.equal(generate(family, eos_token_id=end), library(family, eos_token_id=end))


def test_left_padded_batches_and_dicts() -> None:
    batch = torch.tensor([[257, 257, 72, 105], [72, 101, 108, 108]])
    out = generate("llama/compiled", batch, return_dict_in_generate=True)
    for row, alone in zip(out.sequences, (batch[:1, 2:], batch[1:]), strict=True):
        new, expected = row[batch.shape[1] :], library("llama/compiled", alone)[0, alone.shape[1] :]
        assert torch.equal(new[: len(expected)], expected)
        assert (new[len(expected) :] == 257).all()  # padding, where the other answer is longer


def test_stopping_criteria_streamers_and_samples() -> None:
    class AtFour(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 9])

    class Kept(list):
        put, end = list.append, lambda self: self.append(None)

    streamer = Kept()
    out = generate("llama/compiled", stopping_criteria=transformers.StoppingCriteriaList([AtFour()]), streamer=streamer)
    assert out.shape == (1, 9)
    assert [*streamer[0][0].tolist(), *(int(piece) for piece in streamer[1:-1])] == out[0].tolist()
    assert streamer[-1] is None
    settings = {"do_sample": True, "temperature": 0.9, "num_return_sequences": 2}
    drawn = [generate("llama/compiled", seed=seed, **settings) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0][0], drawn[0][1])  # rows with the same prompt draw for themselves
    assert not torch.equal(drawn[0], drawn[2])


def test_what_exits_cannot_do_is_refused() -> None:
    with pytest.raises(BadInput, match="beams"):
        generate("llama/compiled", num_beams=2)
    with pytest.raises(BadInput, match="no scores"):
        generate("llama/compiled", output_scores=True, return_dict_in_generate=True)
    with pytest.raises(ExitsMismatch, match="learned from other weights"):
        tiny("qwen3").model.generate(TEXT, custom_generate=decoding(modest_exits("llama")), max_new_tokens=2)
    stranger = transformers.AutoModelForCausalLM.from_config(tiny("llama").config)
    with pytest.raises(BadInput, match="did not load or wrap"):
        stranger.generate(TEXT, custom_generate=decoding(modest_exits("llama")), max_new_tokens=2)
