"""The parts of lm/: the corpus and its splits, the 5-gram baseline, training that can be interrupted, the saved folder."""

import json
import os
import random
import signal
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from lm import answers, average, baselines, evaluate, forward, train
from lm import corpus as lm_corpus
from lm import documents as lm_documents
from models import tiny
from offramp.errors import BadInput


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: products as small as these only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


EXCLUDED = "What is the tallest mountain in all of the world?"


def words(count, seed):
    draw = random.Random(seed)
    known = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(150)]
    return [known[min(int(draw.expovariate(0.04)), 149)] for _ in range(count)]


def sources(folder):
    """A book of several pieces that holds an excluded question, and trivia with an excluded and a repeated question."""
    folder.mkdir(exist_ok=True)
    text = words(30_000, seed=1)
    paragraphs = [" ".join(text[at : at + 60]).capitalize() + "." for at in range(0, len(text), 60)]
    paragraphs[7] = "She asked: “What is the TALLEST mountain, in all of the world?” He did not know."
    (folder / "book.txt").write_text("\n\n".join(["# Title: A Book", "## Year: 1900", "-------", *paragraphs]))
    pairs = [(" ".join(words(8, seed)).capitalize() + "?", words(1, seed)[0]) for seed in range(300)]
    pairs += [(EXCLUDED.lower(), "Everest"), pairs[0], (f"Tell me: {EXCLUDED}", "Everest"), ("Why not?", "No")]
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs]
    (folder / "trivia.jsonl").write_text("\n".join(lines))
    (folder / "asked.jsonl").write_text("\n".join(json.dumps({"question": question}) for question in (EXCLUDED, "Why not")))
    return [folder / "book.txt", folder / "trivia.jsonl"], [folder / "asked.jsonl"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    texts, asked = sources(folder / "sources")
    lm_corpus.build(folder / "corpus", texts, [], asked, vocabulary=320)
    return folder / "corpus"


def documents(folder, split):
    return (folder / f"{split}.txt").read_text().split("\f")[:-1]


def test_the_splits_are_disjoint_and_the_same_again(corpus, tmp_path):
    texts, asked = sources(tmp_path / "sources")
    lm_corpus.build(tmp_path / "again", texts, [], asked, vocabulary=320)
    parts = {}
    for split in lm_corpus.SPLITS:
        assert np.array_equal(lm_corpus.load_tokens(tmp_path / "again", split), lm_corpus.load_tokens(corpus, split))
        parts[split] = {line for text in documents(corpus, split) for line in text.split("\n\n")}
        assert any(line.startswith("Question: ") for line in parts[split])
        assert any(not line.startswith("Question: ") for line in parts[split])
    for first, second in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not parts[first] & parts[second]


def test_a_document_keeps_its_split_beside_other_text(corpus, tmp_path):
    (tmp_path / "other.jsonl").write_text(json.dumps({"question": "A new one?", "answer": "Yes."}))
    texts, asked = sources(tmp_path / "sources")
    lm_corpus.build(tmp_path / "more", [tmp_path / "other.jsonl", *reversed(texts)], [], asked, tokenizer_of=corpus)
    assert sorted(documents(tmp_path / "more", "test")) == sorted(documents(corpus, "test"))
    assert AutoTokenizer.from_pretrained(tmp_path / "more").get_vocab() == AutoTokenizer.from_pretrained(corpus).get_vocab()


def test_excluded_questions_are_dropped(corpus):
    record = json.loads((corpus / "corpus.json").read_text())
    book, trivia = record["sources"]
    assert book["dropped"] == {"paragraphs with an excluded question": 1}
    assert trivia["dropped"] == {"documents with an excluded question": 3, "repeated": 1}
    everything = "".join((corpus / f"{split}.txt").read_text() for split in lm_corpus.SPLITS)
    assert lm_documents.letters_of(EXCLUDED) not in lm_documents.letters_of(everything)
    assert "Why not" not in everything
    assert "Title" not in everything
    assert everything.count("Question: ") == 300


def test_tokens_are_the_text_byte_for_byte(corpus):
    tokenizer = AutoTokenizer.from_pretrained(corpus)
    record = json.loads((corpus / "corpus.json").read_text())["splits"]["test"]
    tokens = lm_corpus.load_tokens(corpus, "test")
    assert tokens.dtype == np.uint16
    assert tokenizer.decode(tokens.tolist()).replace(lm_corpus.END, "\f") == (corpus / "test.txt").read_text()
    assert lm_corpus.piece_bytes(tokenizer)[tokens].sum() == record["bytes"]
    assert (tokens == tokenizer.eos_token_id).sum() == record["documents"]


def test_text_is_cleaned():
    lines = [
        "It was a bright cold day in April, and the clocks were striking",
        "thirteen. He slipped in, quickly, through the glass doors.",
        "No.",
    ]
    assert lm_documents.clean("\n# Title: T\n\n## Author: A\n\n-------\n\n" + "\n".join(lines)) == " ".join(lines)
    assert lm_documents.clean("Tyger Tyger,  burning bright,\r\nIn the forests of the night;") == (
        "Tyger Tyger, burning bright,\nIn the forests of the night;"
    )
    assert lm_documents.clean(
        ' = A Ship = \n \n It was 1 @,@ 000 m ( 3 ft ) long . The <unk> sank . " Oh " , he \'s gone . '
    ) == ('A Ship\n\nIt was 1,000 m (3 ft) long. "Oh", he\'s gone.')


def test_records_and_dictionaries_become_documents():
    (document,) = lm_documents.record_documents(
        {"prompt": "Do.\n\n### Instruction:\nName  a cow.\n\n### Response:\n", "response": "Elsie"}
    )
    assert (document.text, document.question) == ("Question: Name a cow. Answer: Elsie", "Name  a cow.")
    entries = "able\n    adj 1: having the\n        means [syn: {fit}]\n\nbe\n  to {exist}\n"
    entries_read = lm_documents.entries("00-database-short\n     A dictionary\n" + entries)
    assert [entry.text for entry in entries_read] == ["able: adj 1: having the means", "be: to exist"]
    with pytest.raises(BadInput, match="neither question and answer nor text"):
        lm_documents.record_documents({"title": "x"})


def test_dictionaries_get_at_most_their_share():
    plain = lm_documents.Source("plain", "", [lm_documents.Document("x" * 100_000)])
    entries = [lm_documents.Document(f"{number}: " + "y" * 100, capped=True) for number in range(5000)]
    dictionary = lm_documents.Source("dictionary", "", entries)
    lm_documents.cap([plain, dictionary], 0.15)
    share = sum(len(entry.text) for entry in dictionary.documents)
    assert share / (share + 100_000) == pytest.approx(0.15, abs=0.02)


def naive(tokens, vocabulary, end, order):
    """Chen and Goodman's formulas, computed with dictionaries, one probability at a time."""
    row = [end] * (order - 1) + tokens
    counts = [Counter() for _ in range(order + 1)]
    counts[order] = Counter(tuple(row[at : at + order]) for at in range(len(tokens)))
    for length in range(order - 1, 0, -1):
        counts[length] = Counter(gram[1:] for gram in counts[length + 1])
    following = [defaultdict(dict) for _ in range(order + 1)]
    for length in range(1, order + 1):
        for gram, count in counts[length].items():
            following[length][gram[:-1]][gram[-1]] = count
    discounts = [baselines.modified_discounts(np.array(list(level.values()) or [1])) for level in counts]

    def probability(context, token, length):
        if length == 0:
            return 1 / vocabulary
        below = probability(context[1:], token, length - 1)
        seen = following[length].get(tuple(context))
        if not seen:
            return below
        taken = {piece: discounts[length][min(count, 3)] for piece, count in seen.items()}
        total = sum(seen.values())
        return (seen.get(token, 0) - taken.get(token, 0)) / total + sum(taken.values()) / total * below

    return lambda context, token: probability(tuple(context), token, order)


@pytest.fixture(scope="module")
def row():
    draw = np.random.default_rng(0)
    return np.minimum(draw.geometric(0.2, 800), 19).astype(np.uint16)


def test_kneser_ney_sums_to_one(row):
    model = baselines.KneserNey(row, 20, end=0)
    draw = np.random.default_rng(1)
    for context in [
        *draw.integers(0, 20, (20, 4)),
        *(row[at : at + 4] for at in range(0, 400, 20)),
        np.zeros(4, np.uint16),
    ]:
        windows = np.column_stack([np.tile(context, (20, 1)), np.arange(20)])
        p = model.probabilities(windows)
        assert (p > 0).all()
        assert p.sum() == pytest.approx(1, abs=1e-12)


def test_kneser_ney_is_the_naive_one(row):
    model, slow = baselines.KneserNey(row, 20, end=0), naive(row.tolist(), 20, 0, 5)
    assert not np.array_equal(baselines.modified_discounts(np.array([1, 1, 2, 3, 4])), [0, 0.5, 1, 1.5])
    new = np.random.default_rng(2).integers(0, 20, 60).astype(np.uint16)
    context, bits = [0] * 4, 0.0
    for token in new.tolist():
        p = slow(context, token)
        assert model.probabilities(np.array([[*context, token]]))[0] == pytest.approx(p, rel=1e-12)
        context, bits = [*context[1:], token], bits - np.log2(p)
    assert model.bits(new) == pytest.approx(bits)


def test_xz_needs_few_bits_for_what_it_has_seen():
    seen = os.urandom(20_000)
    seen = os.urandom(20_000)
    assert baselines.xz_bits(seen, seen[:10_000]) < 4000 < 70_000 < baselines.xz_bits(seen, os.urandom(10_000))


SMALL = train.Settings(steps=6, blocks=3, width=32, state=16, batch=2, length=80)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    record = train.train(corpus, folder, SMALL, command="python -m lm.train")
    return folder, record


@pytest.fixture(scope="module")
def reloaded(trained):
    return AutoModelForCausalLM.from_pretrained(trained[0], dtype=torch.float32).eval()


def interrupt_at(monkeypatch, step):
    """Press Ctrl-C in the middle of this step."""
    real = train.batch_at

    def batch_at(tokens, at, settings):
        if at == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(tokens, at, settings)

    monkeypatch.setattr(train, "batch_at", batch_at)


@pytest.mark.parametrize("goes_on", [False, True])
def test_training_resumes_to_the_same_weights(corpus, trained, tmp_path, monkeypatch, goes_on):
    monkeypatch.setattr(train, "VALIDATE", 0.5)  # every three steps: the interruption is between two points of the curve
    settings, start = SMALL, trained[0] if goes_on else None
    whole = train.train(corpus, tmp_path / "whole", settings, start)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 1)
        assert train.train(corpus, tmp_path / "two", settings, start) is None
    assert not (tmp_path / "two" / "model.safetensors").exists()
    resumed = train.train(corpus, tmp_path / "two", settings, start)
    weights = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "two"))
    assert len(set(weights)) == 1
    assert [point["step"] for point in resumed["curve"]] == [3, 6]
    assert [point | {"seconds": 0} for point in resumed["curve"]] == [point | {"seconds": 0} for point in whole["curve"]]
    assert not (tmp_path / "two" / ".training").exists()


def test_an_unfinished_training_keeps_its_settings(corpus, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 1)
    assert train.train(corpus, tmp_path, SMALL) is None
    with pytest.raises(BadInput, match="other settings"):
        train.train(corpus, tmp_path, train.Settings(steps=7, blocks=3, width=32, state=16, batch=2, length=80))


def test_the_mean_of_two_models_is_a_model(trained, reloaded, tmp_path):
    shifted = AutoModelForCausalLM.from_pretrained(trained[0], dtype=torch.float32)
    with torch.no_grad():
        shifted.backbone.norm_f.weight += 0.5
    train.save(shifted, AutoTokenizer.from_pretrained(trained[0]), tmp_path / "other", {**trained[1], "command": "another"})
    average.average([trained[0], tmp_path / "other"], tmp_path / "mean", "the mean")
    mean = AutoModelForCausalLM.from_pretrained(tmp_path / "mean", dtype=torch.float32)
    assert torch.allclose(mean.backbone.norm_f.weight, reloaded.backbone.norm_f.weight + 0.25, atol=0.01)
    assert torch.equal(mean.backbone.embeddings.weight, reloaded.backbone.embeddings.weight)
    record = json.loads((tmp_path / "mean" / "training.json").read_text())
    assert [model["command"] for model in record["models"]] == [trained[1]["command"], "another"]
    assert record["corpus"] == trained[1]["corpus"]
    assert not (tmp_path / "mean" / ".training").exists()
    with pytest.raises(BadInput, match="is no folder that lm"):
        average.average([trained[0], tmp_path], tmp_path / "nothing")


def test_the_folder_is_one_of_the_library(trained, reloaded, corpus):
    folder, record = trained
    assert type(reloaded).__name__ == "Mamba2ForCausalLM"
    assert reloaded.generation_config.eos_token_id == 0
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "training.json",
        "curve.json",
    } <= {file.name for file in folder.iterdir()}
    assert json.loads((folder / "training.json").read_text()) == record
    assert record["curve"][-1]["done"] == 1
    assert record["validation"]["valid_bits_per_byte"] < record["curve"][0]["valid_bits_per_byte"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (lm_corpus.END,) * 3
    assert tokenizer.decode(tokenizer("The  café.\n\n‘No’")["input_ids"]) == "The  café.\n\n‘No’"


@pytest.mark.parametrize("tokens", [1, 63, 150])
def test_our_forward_pass_is_the_librarys(reloaded, tokens):
    ours = forward.Forward(reloaded)
    ids = torch.randint(0, 320, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        theirs = reloaded(ids, output_hidden_states=True, use_cache=False)
        states = list(ours.states(ids))
        torch.testing.assert_close(ours.read(states[-1]) @ ours.head.T, theirs.logits, atol=1e-4, rtol=0)
    for state, library_state in zip(states, theirs.hidden_states, strict=False):
        torch.testing.assert_close(state, library_state, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tokens", [5, 150])
def test_its_gradients_are_the_librarys_and_nearly_so_in_bfloat16(reloaded, tokens):
    ids = torch.randint(0, 320, (2, tokens + 1), generator=torch.Generator().manual_seed(tokens))
    parameters = dict(reloaded.named_parameters())

    def gradients(loss):
        return torch.autograd.grad(loss, parameters.values())

    theirs = reloaded(ids[:, :-1], use_cache=False).logits
    wanted = gradients(torch.nn.functional.cross_entropy(theirs.flatten(0, 1), ids[:, 1:].flatten()))
    for dtype, far, small in ((torch.float32, 1e-3, 1e-7), (torch.bfloat16, 0.2, 6e-4)):
        ours = forward.Forward(reloaded, dtype=dtype)
        for name, gradient, expected in zip(
            parameters, gradients(ours.loss(ours.last(ids[:, :-1]), ids[:, 1:])), wanted, strict=True
        ):
            assert float((gradient - expected).norm()) <= far * float(expected.norm()) + small, name


def test_the_loss_and_its_gradients_are_cross_entropys(monkeypatch):
    monkeypatch.setattr(forward, "ROWS", 4)
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(10, 8, generator=draw, requires_grad=True)
    weight = torch.randn(20, 8, generator=draw, requires_grad=True)
    targets = torch.randint(0, 20, (10,), generator=draw)
    wanted = torch.nn.functional.cross_entropy(h @ weight.T, targets)
    expected = torch.autograd.grad(3 * wanted, (h, weight))
    loss = forward.HeadLoss.apply(h, weight, targets, torch.float32)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, (h, weight)), expected)


def test_a_model_too_large_is_refused():
    with pytest.raises(BadInput, match="at most 16"):
        train.new_model(train.Settings(blocks=24, width=320), 4096, 0)


def test_every_window_is_read_once_an_epoch():
    tokens = np.arange(1000, dtype=np.uint16)
    settings = train.Settings(batch=3, length=20)
    batches = [train.batch_at(tokens, step, settings) for step in range(16)]
    firsts = torch.cat(batches)[:, 0].sort().values
    assert (firsts.diff() == 20).all()
    assert not torch.equal(train.batch_at(tokens, 16, settings), batches[0])


def test_evaluation_counts_every_token_once():
    rows, counted = evaluate.windows(np.arange(1000), 64, 32)
    assert np.sort(rows[:, 1:][counted]).tolist() == list(range(1, 1000))


def test_evaluation_agrees_with_the_library(reloaded, corpus):
    tokens, lengths = (
        lm_corpus.load_tokens(corpus, "test")[:400],
        lm_corpus.piece_bytes(AutoTokenizer.from_pretrained(corpus)),
    )
    bits = evaluate.bits_per_byte(forward.Forward(reloaded), tokens, lengths)
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(reloaded(ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="sum")
    assert bits == pytest.approx(float(nats) / np.log(2) / lengths[tokens[1:]].sum(), rel=1e-4)


def test_samples_are_the_same_again(reloaded, corpus):
    tokenizer = AutoTokenizer.from_pretrained(corpus)
    once, again = (evaluate.samples(reloaded, tokenizer, ["Why?", "How?", "Who?"], count=4, most=5) for _ in range(2))
    assert once == again
    assert sum(sample.prompt.startswith(f"{lm_corpus.END}Question: ") for sample in once) == 2
    assert sum(sample.prompt == lm_corpus.END for sample in once) == 2


def test_a_larger_models_answers_become_text(tmp_path):
    """An answer is cut after a whole sentence and does not depend on its batch. Each question is answered once."""
    assert answers.whole_sentences("It is blue. It is also") == "It is blue."
    assert answers.whole_sentences("no sentence") == ""
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": f"What is {n}?", "answer": "x"}) + "\n" for n in [*range(9), 3]))
    questions = answers.questions_of([file], 6)
    assert len(set(questions)) == 6
    assert questions[:4] == answers.questions_of([file], 4)
    backbone = tiny("llama")
    alone = [answers.answers(backbone, [question], 12)[0] for question in questions]
    assert answers.answers(backbone, questions, 12) == alone
    assert [len(batch) for batch in answers.batches([str(n) for n in range(150)])] == [64, 64, 22]
