"""Exits in plain transformers: `offramp export` writes a repository, which `model.generate(custom_generate=…)` names."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers import modest_exits, run_cli
from models import BLOCKS, byte_tokenizer, saved, tiny
from offramp import Engine, ExitSet, Policy
from offramp.errors import BadInput, ExitsMismatch
from test_sharing import ran

HELLO = byte_tokenizer()("Hello")["input_ids"]
IDS = torch.tensor([HELLO])
SETTINGS: dict[str, Any] = {"max_new_tokens": 16, "pad_token_id": 257, "do_sample": False}
FILES = [
    "README.md", "custom_generate/generate.py", "custom_generate/requirements.txt", "draft/exits.safetensors",
    "draft/offramp.json", "exits.safetensors", "offramp.json",
]  # fmt: skip
OPEN = Policy((0.3,) * 3)
# Uploads the exported folder, and asks a model for the same answer without it and with it.
USER = """
import json, sys, torch, transformers
from huggingface_hub import HfApi
folder, path = sys.argv[1:]
HfApi().create_repo("some/exits")
HfApi().upload_folder(repo_id="some/exits", folder_path=folder)
model = transformers.AutoModelForCausalLM.from_pretrained(path)
prompt = transformers.AutoTokenizer.from_pretrained(path)("Hello", return_tensors="pt")
settings = {**prompt, "max_new_tokens": 16, "pad_token_id": 257, "do_sample": False}
exits = {"custom_generate": "some/exits", "trust_remote_code": True}

class Heard(list):
    put, end = list.append, lambda self: None

heard = Heard()
answers = [model.generate(**settings), model.generate(**settings, **exits, streamer=heard)]
answers.append(torch.cat([heard[0], torch.cat(heard[1:])[None]], 1))
answers.append(model.generate(**settings, **exits, mode="early", threshold=0.3))
print(json.dumps([answer[0].tolist() for answer in answers]))
try:
    model.generate(**settings, custom_generate="some/exits", trust_remote_code=False)
except ValueError as error:
    print(str(error).splitlines()[0])
"""


class Deaf(transformers.generation.BaseStreamer):
    """A streamer that takes any number of texts."""

    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        pass


@pytest.fixture(params=["llama", "mamba2"])
def world(request: pytest.FixtureRequest, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, exits for it with others that draft, and what `offramp export` makes of them."""
    family = request.param
    saved(tiny(family), tmp_path / "model")
    for seed, place in enumerate(("exits", "exits/draft")):
        exits = modest_exits(family, seed)
        exits.policy = OPEN
        exits.save(tmp_path / place)
    made = export(tmp_path)
    assert made.code == 0, made.stderr
    # Here transformers keeps its copy of the code.
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return tmp_path


def export(folder: Path, *more: str):
    return run_cli("export", "model", "-o", "made", "--exits", "exits", *more, folder=folder)


def plain(world: Path) -> Any:
    """The model, as transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(world / "model")


def generate(world: Path, model: Any, ids: torch.Tensor = IDS, **arguments: Any) -> Any:
    settings = {**SETTINGS, "attention_mask": torch.ones_like(ids), **arguments}
    return model.generate(ids, custom_generate=str(world / "made"), trust_remote_code=True, **settings)


def library(world: Path, **arguments: Any) -> Any:
    return plain(world).generate(IDS, **{**SETTINGS, "attention_mask": torch.ones_like(IDS), **arguments})


def engine(world: Path, fill: str, threshold: float) -> list[int]:
    """The new tokens of offramp's own engine."""
    backbone = tiny(plain(world).config.model_type)
    exits = ExitSet.load(world / "made", backbone).early
    answer = Engine(backbone, exits, Policy((threshold,) * 3), fill).generate(HELLO, max_tokens=16)
    assert answer.mean_blocks < BLOCKS
    return answer.ids


def test_export_writes_what_the_hub_and_transformers_need(world: Path) -> None:
    made = world / "made"
    assert sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()) == FILES
    for place in ("exits.safetensors", "draft/exits.safetensors"):
        assert (made / place).read_bytes() == (world / "exits" / place).read_bytes()
    backbone = tiny(plain(world).config.model_type)
    found = ExitSet.load(made, backbone)
    loaded = [found.early, found.draft]
    assert [exits.policy for exits in loaded] == [OPEN, OPEN]
    assert not torch.equal(*(next(exits.modules.parameters()) for exits in loaded))
    lines = (made / "custom_generate/requirements.txt").read_text().splitlines()
    assert lines[1:] == ["offramp>=0.1.0", "offramp<0.2"]
    assert "mode=None" in (made / "custom_generate/generate.py").read_text()
    card = (made / "README.md").read_text()
    assert "\n- custom_generate\n" in card.split("---")[1]
    assert "`generate` also takes `mode=`" in card


def test_a_folders_exits_draft_the_librarys_own_answer(world: Path) -> None:
    model = plain(world)
    assert torch.equal(generate(world, model), library(world))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert generate(world, model, return_dict_in_generate=True).sequences.tolist() == library(world).tolist()
    penalty = {"repetition_penalty": 1.5, "max_new_tokens": 9}
    assert torch.equal(generate(world, model, **penalty), library(world, **penalty))
    assert torch.equal(generate(world, copy.deepcopy(model)), library(world))


def test_exits_decide_as_in_offramps_engine(world: Path) -> None:
    model = plain(world)
    for threshold in (0.3, (0.3, 0.3, 0.3)):
        ids = generate(world, model, mode="early", threshold=threshold)
        assert ids[0, len(HELLO) :].tolist() == engine(world, "project", 0.3)
    assert torch.equal(generate(world, model, mode="project", threshold=1), library(world))
    with pytest.raises(BadInput, match="2 thresholds do not fit 3 exits"):
        generate(world, model, threshold=(0.3, 0.3))


def test_a_text_streamer_prints_the_answer_once(world: Path, capsys) -> None:
    printed = []
    for answer in (library, lambda folder, **more: generate(folder, plain(folder), **more)):
        answer(world, streamer=transformers.TextStreamer(byte_tokenizer()))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].startswith("Hello")


@pytest.mark.parametrize(
    ("sentence", "arguments"),
    [
        ("no mode 'magic'", {"mode": "magic"}),
        ("with assistant_model", {"assistant_model": tiny("llama").model}),
        ("with stop_strings", {"stop_strings": ["x"], "tokenizer": byte_tokenizer()}),
        ("with stop_strings", {"generation_config": transformers.GenerationConfig(stop_strings=["x"])}),
        ("not with 2 beams", {"num_beams": 2}),
        ("by contrastive search", {"penalty_alpha": 0.6, "top_k": 4}),
        ("with a guidance_scale", {"guidance_scale": 2.0}),
        ("with inputs_embeds", {"inputs_embeds": torch.zeros(1, 5, 32)}),
        ("'half' is not a threshold", {"threshold": "half"}),
        ("streamer works with one prompt", {"ids": IDS.repeat(2, 1), "streamer": Deaf()}),
        (
            "prefix_allowed_tokens_fn works with one prompt",
            {"ids": IDS.repeat(2, 1), "prefix_allowed_tokens_fn": lambda *_: [72]},
        ),
    ],
)
def test_what_exits_cannot_honour_is_refused(world: Path, sentence: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=sentence):
        generate(world, plain(world), **arguments)


def test_a_model_whose_weights_have_changed_is_seen_anew(world: Path) -> None:
    model = plain(world)
    generate(world, model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    wanted = model.generate(IDS, **{**SETTINGS, "attention_mask": torch.ones_like(IDS)})
    with pytest.warns(UserWarning, match="learned from other weights"):
        assert torch.equal(generate(world, model), wanted)
    with pytest.raises(ExitsMismatch, match="learned from other weights"):
        generate(world, model, mode="early")


def test_a_repository_of_the_hub_gives_the_same_as_a_folder(world: Path, hub) -> None:
    user = ran(hub, "-c", USER, str(world / "made"), str(world / "model"))
    assert user.returncode == 0, user.stderr
    answers, refusal = user.stdout.splitlines()
    full, drafted, streamed, early = json.loads(answers)
    assert full == drafted == streamed
    assert early == HELLO + engine(world, "project", 0.3)
    assert "contains custom generation code" in refusal
