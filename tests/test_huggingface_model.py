"""A network of this kit as a Hugging Face model: what it gives, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longnet_kit import experiment, recipe
from longnet_kit.inference import generate, network
from longnet_kit.inference.sampling import Sampling
from tests.model.small import LoraEmbedding
from tests.trained import EXPORTED, train

pytest.importorskip("transformers", reason="the extra longnet_kit[huggingface] is not installed")
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from longnet_kit.huggingface import LongNetCache, LongNetConfig, LongNetForCausalLM

VOCAB = 41
BRANCHES = {"segment_lengths": [4, 12], "dilation_rates": [1, 2]}
RECIPE = """
name: tiny
model: {dim: 16, layers: 2, heads: 2, ffn_dim: 32, dropout: 0.1,
        attention: {backend: dilated, segment_lengths: [8, 32], dilation_rates: [1, 2]}}
data: {source: files, paths: [text.txt], tokenizer: bytes, seq_len: 32, batch_size: 4}
optimizer: {lr: 1.0e-2, warmup_steps: 2}
trainer: {max_steps: 20, limit_val_batches: 0, enable_progress_bar: false, accelerator: cpu}
"""


def model(seed: int = 0, **options: Any) -> LongNetForCausalLM:
    settings = {"vocab_size": VOCAB, "dim": 32, "layers": 2, "heads": 4, "ffn_dim": 48, "seq_len": 16}
    torch.manual_seed(seed)
    attention = {"backend": "dilated", **BRANCHES}
    return LongNetForCausalLM(LongNetConfig(**{**settings, "attention": attention, **options})).double().eval()


def tokens(batch: int = 2, length: int = 21, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums, which the number of rows of a product may change."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def greedy(given: LongNetForCausalLM, prompt: Tensor, **options: Any) -> Tensor:
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt), **options}
    return given.generate(prompt, **settings)  # type: ignore[operator]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained"), RECIPE)


def test_logits_loss_and_gradients_are_the_networks() -> None:
    given, x = model(), tokens()
    labels = x.clone()
    labels[1, 9:] = -100
    found = given(x, labels=labels)
    logits = given.model(x)
    assert torch.equal(found.logits, logits) and found.cache is None
    expected = torch.stack(
        [-logits[i, n].log_softmax(-1)[x[i, n + 1]] for i, end in ((0, 20), (1, 8)) for n in range(end)]
    )
    torch.testing.assert_close(found.loss, expected.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(given(x, labels=labels, num_items_in_batch=7).loss, expected.sum() / 7)
    found.loss.backward()
    gradients = torch.autograd.grad(expected.mean(), list(given.parameters()))
    for (name, p), gradient in zip(given.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12, msg=name)
    loss, same = given(x, labels=labels, return_dict=False)
    assert torch.equal(loss, found.loss) and torch.equal(same, logits)
    close(given(x, logits_to_keep=3).logits, logits[:, -3:])
    given.model.embedding = LoraEmbedding(given.model.embedding).to(logits.dtype)
    close(given(x).logits, given.model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_saved_is_loaded_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    given = model(eos_token_id=40, positions="none", kit_tokenizer="bytes").to(dtype)
    given.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sorted(stored) == sorted(f"model.{name}" for name in given.model.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "longnet_kit"
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.dim, config.hidden_size, config.num_hidden_layers, config.kit_tokenizer) == (32, 32, 2, "bytes")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is LongNetForCausalLM and not again.training
    assert again.model.config == given.model.config and again.generation_config.eos_token_id == 40
    for name, x in given.state_dict().items():
        assert again.state_dict()[name].dtype == dtype and torch.equal(again.state_dict()[name], x), name
    assert torch.equal(again(tokens()).logits, given(tokens()).logits)


def test_weights_that_are_missing_or_unknown_are_refused(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    norm = stored.pop("model.norm.weight")
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"weights are missing: model.norm.weight; is this a model of longnet_kit\?"):
        LongNetForCausalLM.from_pretrained(tmp_path)
    stored |= {"model.norm.weight": norm, "lm_head.weight": norm.clone()}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="weights are left over: lm_head.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}])
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"dim": 64}, r"weights do not fit: model\.blocks\.0\.\S+ is \(32,\) there and \(64,\) here"),
        ({"vocab_size": 50}, r"model\.embedding\.weight is \(41, 32\) there and \(50, 32\) here; is this"),
        ({"layers": 3}, r"weights are missing: model\.blocks\.2\."),
        ({"layers": 1}, r"weights are left over: model\.blocks\.1\."),
    ],
)
def test_weights_of_another_network_name_what_differs(setting: dict, words: str, options: dict, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    with pytest.raises(ValueError, match=words):
        LongNetForCausalLM.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize("source", ["runs/tiny", EXPORTED])
def test_a_run_generates_here_what_it_generates_in_the_kit(
    source: str, trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(trained)
    given, own = LongNetForCausalLM.from_run(source), network.load(source, device="cpu")
    assert not given.training and given.config.eos_token_id == own.tokenizer.eos == 256
    text = own.tokenizer.encode("0.5 is number 12\n0.25 is")
    (expected,) = generate.generate(own, [text.tolist()], max_new_tokens=60, sampling=Sampling(temperature=0))
    given.save_pretrained(tmp_path)
    for found in (given, AutoModelForCausalLM.from_pretrained(tmp_path)):
        row = greedy(found, torch.from_numpy(text.astype("int64"))[None], max_new_tokens=60, pad_token_id=256)[0]
        assert row[len(text) :].tolist() == expected


def test_a_run_keeps_its_dtype_and_settings(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    r = recipe.load(
        "tiny.yaml", ["name=half", "trainer.precision=bf16-true", "trainer.max_steps=1", "model.positions=xpos"]
    )
    given = LongNetForCausalLM.from_run(experiment.run(r))
    assert given.dtype == torch.bfloat16 and given.config.positions == "xpos"
    assert given.config.attention == r.model.attention and given.config.kit_tokenizer == "bytes"
    again = LongNetForCausalLM(given.config).to(torch.bfloat16)
    again.load_state_dict(given.state_dict())
    assert torch.equal(again.eval()(tokens()).logits, given(tokens()).logits)


def test_a_model_that_is_not_causal_is_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    own = network.load("runs/tiny", device="cpu")
    own.network.causal = False
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="runs/tiny is no causal language model"):
        patch.setattr(network, "load", lambda *_, **__: own)
        LongNetForCausalLM.from_run("runs/tiny")
    with pytest.raises(ValueError, match="no recipe 'runs/nowhere'"):
        LongNetForCausalLM.from_run("runs/nowhere")


ATTENTIONS = [
    {"backend": "dilated", **BRANCHES},
    {"backend": "sdpa"},
    {"backend": "naive", "pattern": {"kind": "dilated", **BRANCHES}},
]


@pytest.mark.parametrize("attention", ATTENTIONS, ids=lambda options: options["backend"])
@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 5}, {"num_beams": 3}, {"num_beams": 2, "length_penalty": 2.0}]
)
def test_generating_with_the_cache_equals_generating_without(attention: dict, options: dict) -> None:
    given, x = model(attention=attention), tokens(2, 13)
    torch.manual_seed(5)
    found = greedy(given, x, **options)
    torch.manual_seed(5)
    options = {key: value for key, value in options.items() if key != "prefill_chunk_size"}
    assert torch.equal(found, greedy(given, x, use_cache=False, **options))


def test_beams_that_change_places_take_their_past_with_them() -> None:
    given, x = model(), tokens(3, 17)
    cache = given.new_cache(3)
    given(x[:, :9], cache=cache)
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    with torch.no_grad():
        found = given(x[:, 9:], cache=cache).logits
        expected = given(torch.cat((x[[2, 0, 2], :9], x[:, 9:]), dim=1)).logits[:, 9:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_cache_is_of_fixed_size_and_goes_on_where_it_ended() -> None:
    given, x = model(), tokens(2, 13)
    first = greedy(given, x, return_dict_in_generate=True)
    cache = first.cache
    assert isinstance(cache, LongNetCache) and (cache.batch_size, cache.get_seq_length()) == (2, 24)
    size = cache.stream.nbytes
    second = greedy(given, first.sequences, cache=cache, return_dict_in_generate=True)
    assert torch.equal(second.sequences, greedy(given, x, max_new_tokens=24))
    assert second.cache is cache and cache.stream.nbytes == size and cache.get_seq_length() == 36
    whole = given(second.sequences).logits
    torch.testing.assert_close(given(x, use_cache=True).logits, whole[:, :13].detach(), rtol=0, atol=1e-12)


def test_several_samples_of_each_prompt() -> None:
    given = model()
    torch.manual_seed(3)
    options = {"do_sample": True, "top_k": 5, "num_return_sequences": 3}
    found = greedy(given, tokens(2, 7), **options)
    torch.manual_seed(3)
    assert found.shape == (6, 19) and torch.equal(found, greedy(given, tokens(2, 7), use_cache=False, **options))
    assert len({tuple(row) for row in found.tolist()}) == 6


def test_padding_on_the_right_never_changes_a_real_token() -> None:
    given, x = model(), tokens(2, 21)
    mask = torch.ones_like(x)
    mask[0, 9:] = 0
    found = given(x, attention_mask=mask).logits
    torch.testing.assert_close(found[0, :9], given(x[:1, :9]).logits[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], given(x[1:]).logits[0], rtol=0, atol=1e-12)


def test_padding_before_a_real_token_is_refused() -> None:
    given, x = model(), tokens(2, 9)
    for padded in (slice(0, 2), slice(3, 5)):
        mask = torch.ones_like(x)
        mask[0, padded] = 0
        with pytest.raises(ValueError, match="padding before a real token.*tokenizer.padding_side = 'right'"):
            given(x, attention_mask=mask)
        for options in ({}, {"use_cache": False, "max_new_tokens": 1}):
            with pytest.raises(ValueError, match="has padding.*prompts of one length.*longnet_kit.inference.generate"):
                greedy(given, x, attention_mask=mask, **options)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 8\), expected that of input_ids, \(2, 9\)"):
        given(x, attention_mask=torch.ones(2, 8))


def test_a_cache_says_what_it_cannot_do() -> None:
    given, x = model(), tokens()
    cache = given(x, use_cache=True).cache
    for call in (lambda: cache.crop(1), cache.reset, lambda: cache.batch_select_indices(torch.tensor([0]))):
        with pytest.raises(
            ValueError, match=r"a LongNetCache .*; make a new one with the model's new_cache\(batch_size\)"
        ):
            call()
    with pytest.raises(ValueError, match="cache is a DynamicCache; make one with the model's new_cache"):
        given(x, cache=DynamicCache(config=given.config))
    with pytest.raises(ValueError, match="the cache is for 2 streams, and tokens has a batch of 3"):
        given(tokens(3), cache=cache)
    with pytest.raises(ValueError, match="cache_implementation is 'static', and this model has a cache of its own"):
        greedy(given, x, cache_implementation="static")
    with pytest.raises(ValueError, match="stateful"):
        greedy(given, x[:1], prompt_lookup_num_tokens=2)


def test_libraries_may_give_arguments_of_other_models_as_long_as_they_are_none() -> None:
    given, x = model(), tokens()
    nothing = {"inputs_embeds": None, "position_ids": None, "past_key_values": None}
    assert torch.equal(given(x, **nothing).logits, given(x).logits)
    places = torch.tensor([3, 20])
    close(given(x, logits_to_keep=places).logits, given(x).logits[:, places])
    close(given(x, logits_to_keep=2).logits, given(x).logits[:, -2:])


def test_what_cannot_be_had_is_refused() -> None:
    given, x = model(), tokens()
    for options, words in (
        ({"position_ids": x}, "position_ids: this model takes none; it reads input_ids"),
        ({"output_attentions": True}, "are not to be had; the attention's maps are"),
        ({"labels": x, "use_cache": True}, "with a cache nothing is trained; give labels without one"),
        ({"labels": x, "logits_to_keep": 2}, "logits_to_keep is 2, and labels need them all"),
        ({"labels": x[:, 1:]}, r"labels has shape \(2, 20\), expected that of input_ids, \(2, 21\)"),
    ):
        with pytest.raises(ValueError, match=words):
            given(x, **options)
    with pytest.raises(ValueError, match="tie_word_embeddings is False, and this model's embedding is its head"):
        model(tie_word_embeddings=False)
    with pytest.raises(ValueError, match="dim is 30 and heads is 4; dim must be a multiple of heads"):
        model(hidden_size=30)


def test_the_vocabulary_grows_with_its_head(tmp_path: Path) -> None:
    given = model()
    before = given(tokens()).logits
    given.resize_token_embeddings(VOCAB + 3)
    assert given(tokens()).logits.shape[-1] == VOCAB + 3 == given.config.vocab_size == given.model.config["vocab_size"]
    torch.testing.assert_close(given(tokens()).logits[..., :VOCAB], before)
    given.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, given(tokens()).logits)


def test_without_the_library_the_error_says_what_to_install() -> None:
    program = "import sys; sys.modules['transformers'] = None; import longnet_kit.huggingface"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "needs the library transformers, 5.24 or later; pip install 'longnet_kit[huggingface]'" in ended.stderr
