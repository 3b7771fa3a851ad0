"""The network against transformers' Phi3ForCausalLM, its checkpoints, and what it says of broken ones."""
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, Phi3ForCausalLM

from phi4_ref.model.pretrained import from_hf_config, from_pretrained, save_pretrained, to_hf_config
from phi4_ref.model.transformer import (PHI4_14B, KVCache, ModelConfig, Transformer,
    blocked_attention, count_parameters, eager_attention, flops_per_token, grow_cache)

TINY = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    max_position_embeddings=256, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=3)


def build(seed=0, attention="auto", **changes):
    torch.manual_seed(seed)
    model = Transformer(replace(TINY, **changes), attention)
    for name, weight in model.named_parameters():  # norms of 1 would hide a norm left out or swapped
        if weight.dim() == 1: weight.data.uniform_(0.5, 1.5)
    return model


def ids_of(*shape, seed=1): return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def distance(a, b, ids): return (a(ids).logits - b(ids)).abs().max().item()


@pytest.mark.parametrize("theta", [10_000.0, 250_000.0])
@pytest.mark.parametrize("shape", [dict(), dict(num_attention_heads=8, num_key_value_heads=1), dict(num_key_value_heads=4, num_hidden_layers=3)])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "auto"])
def test_logits_are_those_of_transformers(tmp_path, theta, shape, attention):
    ours = build(attention=attention, rope_theta=theta, **shape)
    save_pretrained(ours, tmp_path / "m")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert type(theirs) is Phi3ForCausalLM and not any(report.values())
    assert distance(theirs, ours, ids_of(2, 200)) < 2e-5


def test_the_base_is_read(tmp_path):
    ours = build(rope_theta=250_000.0)
    save_pretrained(ours, tmp_path / "m")
    assert AutoConfig.from_pretrained(tmp_path / "m").rope_parameters["rope_theta"] == 250_000.0
    file = tmp_path / "m/config.json"
    hf = json.loads(file.read_text())
    del hf["rope_theta"], hf["rope_parameters"]["rope_theta"]
    file.write_text(json.dumps(hf))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert distance(theirs, ours, ids_of(2, 200)) > 0.1, "this comparison notices a base that is not read"


@pytest.mark.parametrize("old", [dict(rope_theta=250_000.0, rope_parameters=None), dict(rope_theta=None), dict(rope_parameters=None)])
def test_the_base_is_found_in_old_and_new_configurations(old):
    assert from_hf_config({**to_hf_config(replace(TINY, rope_theta=250_000.0)), **old}).rope_theta == 250_000.0


def test_changing_the_base_of_a_model_takes_effect():
    model, ids = build(), ids_of(1, 200)
    with torch.no_grad(): before = model(ids)
    model.config = replace(model.config, rope_theta=250_000.0)
    with torch.no_grad(): assert not torch.allclose(before, model(ids), atol=1e-2)
    with torch.no_grad(): torch.testing.assert_close(model(ids), build(rope_theta=250_000.0)(ids))


def test_a_sharded_checkpoint_of_transformers_is_read(tmp_path):
    save_pretrained(build(rope_theta=250_000.0), tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    ours = from_pretrained(tmp_path / "theirs")
    assert ours.config.rope_theta == 250_000.0 and distance(theirs, ours, ids_of(2, 100)) < 2e-5


def test_bfloat16_checkpoint(tmp_path):
    save_pretrained(build().bfloat16(), tmp_path / "m")
    assert AutoConfig.from_pretrained(tmp_path / "m").dtype == torch.bfloat16
    assert from_pretrained(tmp_path / "m").lm_head.weight.dtype == torch.float32
    ours, theirs = (f(tmp_path / "m", dtype=torch.bfloat16) for f in (from_pretrained, AutoModelForCausalLM.from_pretrained))
    assert distance(theirs, ours, ids_of(2, 100)) < 0.15


def test_saved_in_another_dtype(tmp_path):
    "Rounded in the files, and the model as it was."
    model = build()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    save_pretrained(model, tmp_path / "m", dtype=torch.bfloat16)
    assert AutoConfig.from_pretrained(tmp_path / "m").dtype == torch.bfloat16
    back = from_pretrained(tmp_path / "m").state_dict()
    for name, w in model.state_dict().items(): assert torch.equal(w, before[name]) and torch.equal(back[name], w.bfloat16().float())


def test_files_and_ids(tmp_path):
    save_pretrained(build(), tmp_path / "m")
    hf = json.loads((tmp_path / "m/config.json").read_text())
    assert (hf["architectures"], hf["model_type"], hf["sliding_window"], hf["tie_word_embeddings"]) == (["Phi3ForCausalLM"], "phi3", None, False)
    assert (hf["bos_token_id"], hf["eos_token_id"], hf["pad_token_id"]) == (1, 2, 3)
    generation = GenerationConfig.from_pretrained(tmp_path / "m")
    assert generation.eos_token_id == [2, 1] and generation.pad_token_id == 3
    assert from_pretrained(tmp_path / "m").config == TINY


def test_loaded_weights_are_trainable_and_our_own(tmp_path):
    save_pretrained(build(), tmp_path / "m")
    model = from_pretrained(tmp_path / "m")
    before = (tmp_path / "m/model.safetensors").read_bytes()
    model(ids_of(1, 5)).sum().backward()
    assert all(w.requires_grad and w.grad is not None for w in model.parameters())
    with torch.no_grad(): model.lm_head.weight.zero_()
    assert (tmp_path / "m/model.safetensors").read_bytes() == before


def test_saving_replaces_a_checkpoint_and_nothing_else(tmp_path):
    first, second = build(0), build(1)
    save_pretrained(first, tmp_path / "m"); save_pretrained(second, tmp_path / "m")
    assert torch.equal(from_pretrained(tmp_path / "m").lm_head.weight, second.lm_head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["m"], "nothing temporary is left"
    (tmp_path / "thesis").mkdir(); (tmp_path / "thesis/chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match="no checkpoint"): save_pretrained(first, tmp_path / "thesis")
    assert (tmp_path / "thesis/chapter.txt").read_text() == "years of work"


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    import phi4_ref.model.pretrained as module
    old = build(0)
    save_pretrained(old, tmp_path / "m")
    def full(*a, **k): raise OSError("No space left on device")
    monkeypatch.setattr(module, "save_torch_state_dict", full)
    with pytest.raises(OSError): save_pretrained(build(1), tmp_path / "m")
    assert torch.equal(from_pretrained(tmp_path / "m").lm_head.weight, old.lm_head.weight)


def test_a_name_of_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--name/snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True); (tmp_path / "models--org--name/refs").mkdir()
    (tmp_path / "models--org--name/refs/main").write_text("0" * 40)
    save_pretrained(build(), snapshot)
    import huggingface_hub.constants as constants, phi4_ref.model.pretrained as module
    from functools import partial
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(module, "snapshot_download", partial(module.snapshot_download, cache_dir=tmp_path, local_files_only=True))
    assert from_pretrained("org/name").config == TINY
    with pytest.raises(ValueError, match="org/other.*hub"): from_pretrained("org/other")


def cut(path): path.write_bytes(path.read_bytes()[:-100])
def edit(**changes):
    def change(folder):
        hf = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**hf, **changes}))
    return change


FAULTS = {"truncated weights": (lambda p: cut(p / "model.safetensors"), "model.safetensors is truncated"),
    "empty weights": (lambda p: (p / "model.safetensors").write_bytes(b""), "model.safetensors is truncated"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "lacks model.safetensors"),
    "no config": (lambda p: (p / "config.json").unlink(), "lacks config.json"),
    "truncated config": (lambda p: cut(p / "config.json"), "config.json is not JSON"),
    "missing tensor": (edit(num_hidden_layers=3), "lacks 6 tensors, the first model.layers.2.input_layernorm.weight"),
    "unknown tensor": (edit(num_hidden_layers=1), "6 tensors without a place in this network, the first model.layers.1"),
    "wrong shape": (edit(intermediate_size=16), r"layers.0.mlp.gate_up_proj.weight has shape \(96, 32\), config.json gives \(32, 32\)"),
    "other model": (edit(model_type="qwen2"), "model_type is 'qwen2'"),
    "not a Llama": (edit(model_type="llama"), "lacks 10 tensors, the first model.layers.0.mlp.gate_proj.weight"),
    "biases": (edit(attention_bias=True), "attention_bias is True"),
    "biases in the MLP": (edit(mlp_bias=True), "mlp_bias is True"),
    "wide heads": (edit(head_dim=16), "head_dim is 16"),
    "sliding window": (edit(sliding_window=100), "sliding_window is 100"),
    "scaled rope": (edit(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "rope_type is 'longrope'"),
    "old scaled rope": (edit(rope_parameters=None, rope_scaling={"type": "yarn"}), "rope_type is 'yarn'"),
    "partial rope": (edit(rope_parameters=None, partial_rotary_factor=0.75), "partial_rotary_factor is 0.75"),
    "tied": (edit(tie_word_embeddings=True), "says tie_word_embeddings, but lm_head.weight is not the embedding")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_named(tmp_path, fault):
    break_it, message = FAULTS[fault]
    save_pretrained(build(), tmp_path / "m")
    break_it(tmp_path / "m")
    with pytest.raises(ValueError, match=message): from_pretrained(tmp_path / "m")


def test_a_missing_shard_and_a_missing_directory_are_named(tmp_path):
    save_pretrained(build(), tmp_path / "m")
    AutoModelForCausalLM.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "s", max_shard_size="10KB")
    shard = sorted((tmp_path / "s").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}"): from_pretrained(tmp_path / "s")
    with pytest.raises(ValueError, match="no checkpoint directory"): from_pretrained(tmp_path / "nowhere")


def test_user_errors_are_named():
    with pytest.raises(ValueError, match="num_attention_heads=4 is not a multiple"): replace(TINY, num_key_value_heads=3)
    with pytest.raises(ValueError, match="must be even"): replace(TINY, hidden_size=12)
    with pytest.raises(ValueError, match="attention='fast'"): Transformer(TINY, "fast")
    with pytest.raises(ValueError, match="position_ids_BT"): build()(ids_of(1, 3), cache=KVCache(TINY, 1, 8))
    with pytest.raises(ValueError, match="beyond the cache's 4 slots"): build()(ids_of(1, 5), torch.arange(5)[None], KVCache(TINY, 1, 4))


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 200])
def test_blocked_attention_is_attention(length):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    grad = torch.randn(2, 6, length, 8, dtype=torch.float64)
    ours = torch.autograd.grad(blocked_attention(q, k, v), (q, k, v), grad)
    plain = torch.autograd.grad(eager_attention(q, k, v), (q, k, v), grad)
    for a, b in zip(ours, plain): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # eager's softmax is in float32


def test_gradients_are_those_of_transformers(tmp_path):
    ours, ids = build(rope_theta=250_000.0), ids_of(2, 100)
    ids[ids == TINY.pad_token_id] = 4  # transformers gives the padding row of the embedding no gradient
    save_pretrained(ours, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for logits in (ours(ids), theirs(ids).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    their = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters(): torch.testing.assert_close(weight.grad, their[name].grad, rtol=1e-3, atol=1e-6)


def test_a_token_sees_nothing_after_it():
    model, ids = build(), ids_of(1, 150)
    changed = ids.clone(); changed[0, 100] = (changed[0, 100] + 1) % 64
    with torch.no_grad(): a, b = model(ids), model(changed)
    assert torch.equal(a[:, :100], b[:, :100]) and not torch.allclose(a[:, 100:], b[:, 100:])


@pytest.mark.parametrize("attention", ["eager", "sdpa", "auto"])
def test_cache_changes_nothing(attention):
    model, ids, lengths = build(attention=attention), ids_of(3, 40), [20, 13, 1]
    with torch.no_grad():
        whole = model(ids)
        cache = KVCache(TINY, 3, 20)
        padded = torch.stack([torch.cat([ids[i, :n], torch.full((20 - n,), 7)]) for i, n in enumerate(lengths)])
        first = model(padded, torch.arange(20).expand(3, 20), cache)
        for i, n in enumerate(lengths): torch.testing.assert_close(first[i, :n], whole[i, :n], rtol=0, atol=2e-5)
        grow_cache(cache, 40)
        for step in range(20):  # each row goes on from its own length
            at = torch.tensor([[n + step] for n in lengths])
            logits = model(ids.gather(1, at), at, cache)
            torch.testing.assert_close(logits[:, 0], whole[torch.arange(3), at[:, 0]], rtol=0, atol=2e-5)
        more = torch.tensor([[n + 20 + j for j in range(3)] for n in (10, 13, 1)])  # several tokens at once, into a used cache
        torch.testing.assert_close(model(ids.gather(1, more), more, cache)[1:], whole[torch.arange(3)[:, None], more][1:], rtol=0, atol=2e-5)


def test_padding_that_is_nan_does_not_leak():
    cache = KVCache(TINY, 1, 16)
    assert not cache.k_LBKSD.isnan().any() and not cache.v_LBKSD.isnan().any()
    grow_cache(cache, 300)
    assert cache.k_LBKSD.shape[3] == 300 and not cache.v_LBKSD.any()


def test_autocast_stays_close():
    model, ids = build(), ids_of(2, 100)
    with torch.no_grad():
        exact = model(ids).log_softmax(-1)
        with torch.autocast("cpu", torch.bfloat16): rough = model(ids)
    assert rough.dtype == torch.bfloat16 and (rough.float().log_softmax(-1) - exact).abs().mean() < 0.05


def test_the_14b_model():
    with torch.device("meta"): assert count_parameters(Transformer(PHI4_14B)) == 14_659_507_200
    assert (PHI4_14B.head_dim, PHI4_14B.rope_theta, PHI4_14B.max_position_embeddings) == (128, 250_000.0, 16_384)


def test_flops_are_those_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"), FlopCounterMode(display=False) as counter: Transformer(TINY, "eager")(torch.zeros(3, 50, dtype=torch.long)).sum().backward()
    assert counter.get_total_flops() == 150 * flops_per_token(TINY, 50)


def test_same_seed_same_weights():
    a, b, c = build(0), build(0), build(1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters())) and not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_the_first_call_of_each_function_is_on_one_number():
    "MKL chooses its code on a function's first call, wrongly if several threads make it: importing us makes it."
    script = """if 1:
        import torch
        first = {}
        def watch(name, function): return lambda x: (first.setdefault((name, x.dtype), x.numel()), function(x))[1]
        names = ('exp', 'log', 'sqrt', 'sin', 'cos', 'tanh', 'erf')
        for name in names: setattr(torch, name, watch(name, getattr(torch, name)))
        import phi4_ref.model.transformer
        missing = [(n, d) for n in names for d in (torch.float32, torch.float64) if first.get((n, d)) != 1]
        assert not missing, missing"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
