"""Mixers in the places of attentions: what is trained is what is shipped, and what is shipped is the library's Bamba."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

import offramp
from hybrid import distil, evaluate
from hybrid.student import Student
from lm.corpus import command_line
from models import COMPILED, byte_tokenizer
from offramp.errors import BadInput, CorruptFile
from offramp.files import shipped
from offramp.model import hub
from offramp.model.hybrid import GROUP, MATRICES, MIXERS, ROUNDED, base_of, read_mixers, to_bamba, write_mixers
from offramp.model.loading import wrap
from offramp.training.config import TrainConfig
from offramp.training.data import gather

REPLACED = (0, 2, 3)


@pytest.fixture(scope="module")
def student() -> Student:
    """A random model of the llama kind, in which three heads of queries share one of keys and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=72, intermediate_size=96, num_hidden_layers=5, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=256, eos_token_id=257, max_position_embeddings=512,
        initializer_range=0.2,
    )  # fmt: skip
    return Student(LlamaForCausalLM(config), torch.float32)


@pytest.fixture(scope="module")
def mixers(student):
    made = student.new_mixers()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return {block: made[block] for block in REPLACED}


def tensors_of(mixers):
    return {block: mixer.tensors() for block, mixer in mixers.items()}


@torch.inference_mode()
def test_a_model_with_mixers_is_the_librarys_bamba(student, mixers) -> None:
    ids = torch.randint(0, 258, (2, 150))
    ours = student.logits(student.last(ids, mixers))
    bamba = to_bamba(student.model, tensors_of(mixers))
    assert bamba.config.model_type == "bamba"
    assert [kind == "linear_attention" for kind in bamba.config.layer_types] == [block in REPLACED for block in range(5)]
    assert torch.allclose(ours, bamba(input_ids=ids).logits, atol=1e-4)
    assert not torch.allclose(ours, student.logits(student.last(ids, {})), atol=1e-2)


@torch.inference_mode()
def test_without_mixers_the_student_is_the_model(student) -> None:
    ids = torch.randint(0, 258, (2, 70))
    assert torch.allclose(student.logits(student.last(ids, {})), student.model(input_ids=ids).logits, atol=1e-4)


def test_mixers_are_kept_in_integers(student, mixers, tmp_path) -> None:
    kept = tensors_of(mixers)
    write_mixers(tmp_path / MIXERS, kept, {"base": "tiny"})
    read = read_mixers(tmp_path / MIXERS)
    assert list(read) == list(REPLACED)
    assert base_of(tmp_path / MIXERS) == "tiny"
    for block in REPLACED:
        for name, value in kept[block].items():
            if name not in ROUNDED:
                assert torch.equal(read[block][name], value), name
                continue
            width = math.gcd(GROUP, value.shape[1])
            groups, made = value.unflatten(1, (-1, width)), read[block][name].unflatten(1, (-1, width))
            # Better than with the scale at which each group's largest value is -8.
            scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
            plain = (groups / scale).round().clamp(-8, 7) * scale
            assert (made - groups).norm() < (plain - groups).norm(), name
            assert bool(((made - groups).abs() <= 1.1 * scale.abs()).all()), name
    matrices = sum(mixer[name].numel() for mixer in kept.values() for name in MATRICES)
    assert (tmp_path / MIXERS).stat().st_size < 1.3 * matrices


def test_the_mixers_that_ship_are_in_integers_of_8_bits() -> None:
    """The older format."""
    folder = next(folder for folder in shipped("models") if folder.name == "smollm2-hybrid")
    with safe_open(folder / MIXERS, "pt") as tensors:
        kept, scale = tensors.get_tensor("5.C"), tensors.get_tensor("5.C.scale")
    assert kept.dtype == torch.int8
    assert torch.equal(read_mixers(folder / MIXERS)[5]["C"], kept * scale)


@pytest.mark.parametrize("damage", [lambda data: b"no tensors", lambda data: data[: len(data) // 2]])
def test_damaged_mixers_are_named(mixers, tmp_path, damage) -> None:
    write_mixers(tmp_path / MIXERS, tensors_of(mixers), {"base": "tiny"})
    (tmp_path / MIXERS).write_bytes(damage((tmp_path / MIXERS).read_bytes()))
    with pytest.raises(CorruptFile, match="damaged"):
        read_mixers(tmp_path / MIXERS)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"x": torch.zeros(2)},
        {f"{'9' * 5000}.x": torch.zeros(2, 2)},
        {"0.x": torch.zeros(9, 1, dtype=torch.int8), "0.x.scale": torch.ones(1, 9)},  # not an outer product
        {"0.x": torch.zeros(9, dtype=torch.int8), "0.x.scale": torch.ones(9, 1)},
    ],
)
def test_a_file_of_something_else_has_no_mixers(tensors, tmp_path) -> None:
    save_file(tensors, tmp_path / MIXERS, {"record": '{"base": "base"}'})
    with pytest.raises(CorruptFile, match="not complete"):
        read_mixers(tmp_path / MIXERS)


def test_mixers_of_other_shapes_are_refused(student, mixers, tmp_path, own_cache, monkeypatch) -> None:
    student.model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "hybrid").mkdir()
    monkeypatch.setattr(hub, "ALIASES", {"base": tmp_path / "base", "hybrid": tmp_path / "hybrid"})
    mixer = next(iter(tensors_of(mixers).values()))
    for wrong in ({"A_log": torch.zeros(0)}, {"taps": torch.zeros(3)}, {"C": mixer["C"][:-1]}, {"out": mixer["x"]}):
        write_mixers(tmp_path / "hybrid" / MIXERS, {0: {**mixer, **wrong}}, {"base": "base"})
        with pytest.raises(CorruptFile, match="do not fit base"):
            hub.resolve("hybrid")


def test_mixers_that_lack_a_tensor_are_named(mixers, tmp_path) -> None:
    kept = tensors_of(mixers)
    write_mixers(tmp_path / MIXERS, {0: kept[0]}, {})
    complete = (tmp_path / MIXERS).read_bytes()
    (tmp_path / MIXERS).write_bytes(complete.replace(b"0.A_log", b"0.B_log"))
    with pytest.raises(CorruptFile, match="not complete"):
        read_mixers(tmp_path / MIXERS)
    with pytest.raises(CorruptFile, match="damaged"):
        base_of(tmp_path / MIXERS)


@torch.inference_mode()
def test_an_alias_puts_mixers_onto_another_alias(student, mixers, tmp_path, own_cache, monkeypatch) -> None:
    student.model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "hybrid").mkdir()
    write_mixers(tmp_path / "hybrid" / MIXERS, tensors_of(mixers), {"base": "base"})
    monkeypatch.setattr(hub, "ALIASES", {"base": tmp_path / "base", "hybrid": tmp_path / "hybrid"})
    backbone = offramp.load("hybrid", "float32").backbone
    assert backbone.engine == ("compiled blocks" if COMPILED else "library blocks")
    assert backbone.kinds == ["mamba" if block in REPLACED else "attention" for block in range(5)]
    folder = hub.resolve("hybrid").path
    library = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, 258, (1, 40))
    h, step = backbone.embed(ids, 0)
    ours = backbone.logits(backbone.run(h, 0, 5, backbone.state(), step))
    assert torch.allclose(ours, library(input_ids=ids).logits, atol=1e-4)
    assert backbone.tokenizer.decode([72, 105]) == byte_tokenizer().decode([72, 105])
    # Another base, or other mixers, are another model.
    before = hub.resolve("hybrid").sha256
    write_mixers(tmp_path / "hybrid" / MIXERS, {0: tensors_of(mixers)[0]}, {"base": "base"})
    assert hub.resolve("hybrid").sha256 != before
    assert offramp.load("hybrid", "float32").backbone.kinds.count("mamba") == 1


@torch.inference_mode()
def test_a_model_without_any_attention_is_loaded_and_answers(student, tmp_path, own_cache, monkeypatch) -> None:
    student.model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "pure").mkdir()
    write_mixers(tmp_path / "pure" / MIXERS, tensors_of(dict(enumerate(student.new_mixers()))), {"base": "base"})
    monkeypatch.setattr(hub, "ALIASES", {"base": tmp_path / "base"})
    backbone = offramp.load(tmp_path / "pure", "float32").backbone
    assert set(backbone.kinds) == {"mamba"}
    ids = offramp.Engine(backbone).generate("Hello", max_tokens=6).ids
    library = AutoModelForCausalLM.from_pretrained(hub.resolve(tmp_path / "pure").path, dtype=torch.float32)
    prompt = backbone.prompts.encode("Hello")
    logits = library(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == ids


@pytest.fixture(scope="module")
def texts(student, tmp_path_factory):
    """The model's own view of random texts, as training reads it."""
    folder = tmp_path_factory.mktemp("texts")
    backbone = wrap(student.model, byte_tokenizer(), "tiny")
    (folder / "prompts.txt").write_text("".join(f"Say {number}, and more.\n" for number in range(60)))
    config = TrainConfig(prompts=str(folder / "prompts.txt"), temperatures=(0.0, 1.0), answer_tokens=24)
    return gather(backbone, config, (backbone.n_blocks,), folder / "work")


def distillery(student, texts, work, **settings) -> distil.MixerTraining:
    usual = {"keep": 3, "match_hours": 4e-4, "join_hours": 1e-4, "answer_hours": 1e-4}
    chosen = distil.Settings(**{**usual, **settings})
    return distil.MixerTraining(student, texts, chosen, work, lambda line: None)


def test_distillation_brings_mixers_near_and_keeps_the_attentions_that_are_missed_most(student, texts, tmp_path) -> None:
    made = distillery(student, texts, tmp_path)
    far = made.answered(made.chosen(range(5)))[0]
    mixers = made.run()
    curve = json.loads((tmp_path / "match-3.json").read_text())
    assert sum(curve[-1]["held"]) < sum(curve[0]["held"])
    assert made.answered(made.chosen(range(5)))[0] < far
    damage = json.loads((tmp_path / "order.json").read_text())
    assert sorted(mixers) == sorted(sorted(range(5), key=damage.__getitem__)[:2])
    # What is done is not done again, and gives the same mixers.
    again = distillery(student, texts, tmp_path)
    again._train = None  # type: ignore[assignment]
    for block, mixer in again.run().items():
        for name, value in mixer.tensors().items():
            assert torch.equal(value, mixers[block].tensors()[name])


def test_a_later_stage_goes_on_with_the_mixers_that_were_written(student, mixers, texts, tmp_path, monkeypatch) -> None:
    write_mixers(tmp_path / MIXERS, tensors_of({block: mixers[block] for block in (0, 3)}), {"base": "tiny"})
    given, begun = read_mixers(tmp_path / MIXERS), {}
    keep = lambda self, name, module, chosen, *rest: begun.update({name: tensors_of(chosen)})  # noqa: E731
    monkeypatch.setattr(distil.MixerTraining, "_train", keep)

    assert sorted(distillery(student, texts, tmp_path / "same", start=str(tmp_path)).run()) == [0, 3]
    assert list(begun) == ["answers-3"]
    # More are added where fewer attentions are to stay; those alone are matched.
    replaced = sorted(distillery(student, texts, tmp_path / "more", keep=1, start=str(tmp_path)).run())
    assert list(begun) == ["answers-3", "match-1", "join-1", "answers-1"]
    assert sorted([*begun["match-1"], 0, 3]) == replaced == sorted(begun["join-1"])
    for name in ("answers-3", "join-1", "answers-1"):
        for block in given:
            torch.testing.assert_close(begun[name][block], given[block])
    with pytest.raises(BadInput, match="keeps 3 attentions"):
        distillery(student, texts, tmp_path / "other", keep=4, start=str(tmp_path)).run()


def test_the_first_output_projection_is_the_least_squares_one(student, texts, tmp_path) -> None:
    made = distillery(student, texts, tmp_path)
    mixers = made.chosen(range(5))
    before = made._matched(mixers)
    made._kept("start", range(5), made._start)
    after = made._matched(mixers)
    assert all(near < far for near, far in zip(after, before, strict=True))
    assert max(after) < 1.5


def test_batches_are_equally_long_and_have_every_text_once_an_epoch(texts) -> None:
    batches = distil.Texts(texts.adapters, seed=0)
    epoch = [batches.at(step) for step in range(len(batches.batches(0)))]
    assert sorted(index for batch in epoch for index in batch) == list(range(len(texts.adapters)))
    assert all(len({batches.sizes[index] for index in batch}) == 1 for batch in epoch)
    assert batches.at(len(epoch)) == distil.Texts(texts.adapters, seed=0).at(len(epoch)) != epoch[0]


@pytest.mark.parametrize("module", ["hybrid.distil", "lm.train"])
def test_the_command_that_is_recorded_names_its_module(module, monkeypatch) -> None:
    file = Path(__file__).parents[1] / module.replace(".", "/")
    monkeypatch.setattr(sys, "argv", [f"{file}.py", "/some/folder/work", "--keep", "15"])
    assert command_line() == f"python -m {module} work --keep 15"


def test_evaluation_measures_text_and_answers_and_shows_samples(student, mixers, tmp_path, capsys, monkeypatch) -> None:
    models = {
        "tiny": wrap(student.model, byte_tokenizer(), "tiny"),
        "mixed": wrap(to_bamba(student.model, tensors_of(mixers)), byte_tokenizer(), "mixed"),
    }
    monkeypatch.setattr(evaluate.offramp, "load", lambda name: offramp.Model(models[name]))
    (tmp_path / "text.txt").write_text("Some text, and more of it. " * 30)
    (tmp_path / "prompts.txt").write_text("".join(f"Say {number}, and more.\n" for number in range(30)))
    files = ["--text", "text.txt", "--prompts", "prompts.txt", "--samples", "samples.md"]
    monkeypatch.chdir(tmp_path)
    evaluate.main([*models, *files, "--count", "6"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] == list(models)
    for _, perplexity, bits, *_ in rows:  # a byte is a token here
        assert float(bits) == pytest.approx(math.log2(float(perplexity)), abs=1e-3)
    # A model finds what it finds itself; it knows its own answers better than another model does.
    assert rows[0][4] == "100.0%" != rows[1][4]
    assert float(rows[0][3]) < float(rows[1][3])
    samples = (tmp_path / "samples.md").read_text()
    assert samples.count("\n## ") == samples.count("- **tiny**: ") == evaluate.SAMPLES
    answer = offramp.Engine(models["mixed"]).generate("Say 0, and more.", max_tokens=evaluate.SAMPLE_TOKENS).text
    assert f"- **mixed**: {' '.join(answer.split())}\n" in samples
    evaluate.main(["tiny", *files[2:], "--count", "6", "--modes", "full,full"])
    assert (tmp_path / "samples.md").read_text().count("- **tiny, full**: ") == evaluate.SAMPLES


def test_evaluation_says_what_it_lacks(tmp_path, capsys) -> None:
    for arguments in (["--samples", "samples.md"], ["--prompts", str(tmp_path / "none.jsonl")]):
        with pytest.raises(SystemExit):
            evaluate.main(["mamba-tiny", *arguments])
        assert "Traceback" not in capsys.readouterr().err
