"""The back-ends against each other and against transformers; packed documents, activation checkpointing, torch.compile, bfloat16."""
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Phi3ForCausalLM

import phi4_ref.model.transformer as module
from phi4_ref.model.pretrained import save_pretrained
from phi4_ref.model.transformer import (ATTENTION, KVCache, ModelConfig, RMSNorm, Transformer, auto_attention, cu_seqlens,
    document_mask, document_starts, eager_attention, flash_attention, rope_table, rotate, sdpa_attention)
from phi4_ref.train.loop import lm_loss, plain_lm_loss

TINY = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    max_position_embeddings=256, initializer_range=0.2)
MASKED = {"eager": eager_attention, "sdpa": sdpa_attention, "auto": auto_attention}  # what takes a mask
HAS_FLASH = module.flash_attn_varlen_func is not None and torch.cuda.is_available()


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
           softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None):
    "flash_attn.flash_attn_varlen_func in plain PyTorch (the kernel needs a GPU): its signature, the checks its binding makes, its arithmetic."
    lengths = cu_seqlens_q.diff()
    assert q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype, "FlashAttention only supports fp16 and bf16"
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and cu_seqlens_q.ndim == 1 and cu_seqlens_q.is_contiguous()
    assert q.ndim == k.ndim == v.ndim == 3 and k.shape == v.shape and q.shape[2] == k.shape[2] and q.shape[1] % k.shape[1] == 0
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "the last dimension must be contiguous"
    assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(q) == len(k) and lengths.min() >= 0 and lengths.max() <= max_seqlen_q
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k and causal and type(max_seqlen_q) is int
    groups, out = q.shape[1] // k.shape[1], []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist()):
        qd, kd, vd = q[start:end].float(), k[start:end].float().repeat_interleave(groups, 1), v[start:end].float().repeat_interleave(groups, 1)
        score = torch.einsum("thd,shd->hts", qd, kd) / q.shape[2] ** 0.5
        weight = score.masked_fill(torch.ones(score.shape[1:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        out.append(torch.einsum("hts,shd->thd", weight, vd))
    return torch.cat(out).to(q.dtype)


@pytest.fixture
def kernel(monkeypatch): monkeypatch.setattr(module, "flash_attn_varlen_func", varlen)


def build(attention="auto", seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    model = Transformer(replace(TINY, **changes), attention)
    for name, weight in model.named_parameters():  # norms of 1 would hide a norm left out or swapped
        if weight.dim() == 1: weight.data.uniform_(0.5, 1.5)
    return model.to(dtype)


def ids_of(*shape, seed=1): return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
def positions(*rows): return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
def heads(T, B=2, H=6, K=2, D=8, dtype=torch.float32, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, h, T, D, generator=g).to(device, dtype).requires_grad_() for h in (H, K, K)]


@st.composite
def packed_rows(draw, most=40):
    "Lengths of the documents of one to three rows of the same width."
    width = draw(st.integers(1, most))
    cuts = draw(st.lists(st.sets(st.integers(1, width - 1), max_size=6) if width > 1 else st.just(set()), min_size=1, max_size=3))
    return [[b - a for a, b in zip([0, *sorted(c)], [*sorted(c), width])] for c in cuts]


# Documents in a row

@settings(deadline=None)
@given(packed_rows())
def test_boundaries_and_mask_of_random_cuts(rows):
    position_ids, width = positions(*rows), sum(rows[0])
    ends = torch.tensor([n for lengths in rows for n in lengths]).cumsum(0).tolist()
    assert cu_seqlens(position_ids).tolist() == [0, *ends] and cu_seqlens(position_ids).dtype == torch.int32
    assert document_starts(position_ids).sum() == len(ends)
    for row, lengths in enumerate(rows):
        blocks = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths))
        assert torch.equal(document_mask(position_ids)[row] == 0, blocks == 1)


def test_a_document_begins_where_positions_do_not_go_on_by_one():
    position_ids = torch.tensor([[7, 8, 9, 0, 0, 0, 5, 6]])  # a row that begins late, padding at position 0, a jump
    assert document_starts(position_ids).int().tolist() == [[1, 0, 0, 1, 1, 1, 1, 0]]


def same_as_alone(model, rows, **tolerance):
    "Logits of packed rows against those of their documents one at a time."
    ids = ids_of(len(rows), sum(rows[0]))
    with torch.no_grad():
        packed = model(ids, positions(*rows))
        for row, lengths in enumerate(rows):
            for part, document in zip(packed[row].split(lengths), ids[row].split(lengths)):
                torch.testing.assert_close(part, model(document[None])[0], **tolerance)


@pytest.mark.parametrize("attention", MASKED)
@settings(max_examples=25, deadline=None)
@given(rows=packed_rows(90))
def test_packed_documents_are_as_alone(attention, rows): same_as_alone(build(attention), rows, rtol=0, atol=5e-5)


@settings(max_examples=25, deadline=None)
@given(rows=packed_rows(90))
def test_packed_documents_are_as_alone_in_flash(rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "flash_attn_varlen_func", varlen)
        same_as_alone(build("flash", dtype=torch.bfloat16), rows, rtol=0, atol=0.25)  # of logits with a deviation of about 7


@pytest.mark.parametrize("attention", ATTENTION)
def test_documents_of_a_row_meet_unless_masked(attention, kernel):
    dtype = torch.bfloat16 if attention == "flash" else torch.float32
    model, ids = build(attention, dtype=dtype), ids_of(1, 24)
    changed = ids.clone(); changed[0, 3] = (changed[0, 3] + 1) % 64
    with torch.no_grad():
        assert not torch.allclose(model(ids)[:, 10:], model(changed)[:, 10:], atol=1e-2), "the default is full causal attention over the row"
        masked = positions([10, 14])
        assert torch.equal(model(ids, masked)[:, 10:], model(changed, masked)[:, 10:])


@pytest.mark.parametrize("attention", MASKED)
def test_gradients_of_a_packed_row_are_the_sum_of_its_documents(attention):
    model, ids, lengths = build(attention), ids_of(1, 50), [7, 30, 13]
    weight = model.model.layers[0].self_attn.qkv_proj.weight
    model(ids, positions(lengths)).square().sum().backward()
    packed, weight.grad = weight.grad, None
    for document in ids.split(lengths, 1): model(document).square().sum().backward()
    torch.testing.assert_close(packed, weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("loss", [plain_lm_loss, lm_loss])
def test_the_loss_takes_positions_from_the_batch(loss):
    model, ids = build(), ids_of(2, 30)
    rows = [[10, 20], [30]]
    labels = ids.masked_fill(document_starts(positions(*rows)), -100)  # nothing predicts the first token of a document
    packed, targets, _ = loss(model, dict(input_ids=ids, labels=labels, position_ids=positions(*rows)))
    alone = [loss(model, dict(input_ids=d, labels=d)) for d in (ids[:1, :10], ids[:1, 10:], ids[1:])]
    torch.testing.assert_close(packed, sum(total for total, _, _ in alone))
    assert targets == sum(n for _, n, _ in alone) == 57


def test_one_row_of_positions_serves_all_rows(kernel):
    ids, masked = ids_of(3, 20), positions([8, 12])
    for attention in ATTENTION:
        model = build(attention, dtype=torch.bfloat16 if attention == "flash" else torch.float32)
        with torch.no_grad(): assert torch.equal(model(ids, masked), model(ids, masked.expand(3, -1)))


def test_padding_after_a_document_changes_nothing_before_it():
    model, ids = build(), ids_of(1, 20)
    padded = torch.cat((ids, torch.zeros(1, 5, dtype=torch.long)), 1)
    position_ids = torch.cat((torch.arange(20), torch.zeros(5, dtype=torch.long)))[None]  # every token of padding is a document of its own
    with torch.no_grad(): logits = model(padded, position_ids)
    assert logits.isfinite().all()
    with torch.no_grad(): torch.testing.assert_close(logits[:, :20], model(ids), rtol=0, atol=5e-5)


# Against transformers

@pytest.fixture(scope="module", params=["eager", "sdpa"])
def theirs(request, tmp_path_factory):
    "transformers' load of `build()`'s weights, with either of its own back-ends."
    folder = tmp_path_factory.mktemp("phi3") / "m"
    save_pretrained(build(), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=request.param)
    assert type(model) is Phi3ForCausalLM and model.config._attn_implementation == request.param
    return model


@pytest.mark.parametrize("attention", MASKED)
@pytest.mark.parametrize("rows", [None, [[60, 3, 87], [150]], [[1, 149], [75, 75]]])
@torch.no_grad()
def test_logits_are_those_of_transformers(theirs, attention, rows):
    ids, position_ids = ids_of(2, 150), positions(*rows) if rows else None
    their = theirs(ids, position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(build(attention)(ids, position_ids), their, rtol=0, atol=5e-5)


# Back-ends against each other

@pytest.mark.parametrize("attention", ["sdpa", "auto"])
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("T", [1, 7, 64, 130])
@pytest.mark.parametrize("packed", [False, True])
def test_back_ends_agree_in_outputs_and_gradients(attention, groups, T, packed):
    qkv = heads(T, K=6 // groups)
    mask = document_mask(positions([T // 3, T - T // 3], [T])) if packed else None
    grad = torch.randn(2, 6, T, 8, generator=torch.Generator().manual_seed(5))
    for attend in (ATTENTION[attention], eager_attention):
        out = attend(*qkv, mask)
        grads = torch.autograd.grad(out, qkv, grad)
        if attend is eager_attention: break
        ours, our_grads = out, grads
    torch.testing.assert_close(ours, out, rtol=0, atol=5e-6)
    for a, b in zip(our_grads, grads): torch.testing.assert_close(a, b, rtol=0, atol=5e-5)


@pytest.mark.parametrize("K", [1, 2, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_flash_agrees_with_eager(kernel, K, packed):
    rows = positions([5, 1, 24], [30])
    qkv = heads(30, K=K, dtype=torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    out = flash_attention(*qkv, cu_seqlens(rows) if packed else None)
    reference = eager_attention(*exact, document_mask(rows) if packed else None)
    torch.testing.assert_close(out.float(), reference, rtol=0, atol=0.02)
    out.float().square().sum().backward(); reference.square().sum().backward()
    for a, b in zip(qkv, exact): torch.testing.assert_close(a.grad.float(), b.grad, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("dtype,atol", [(torch.float32, 5e-5), (torch.bfloat16, 0.35)])
@pytest.mark.parametrize("rows", [None, [[40, 60], [100]]])
@torch.no_grad()
def test_models_agree(kernel, dtype, atol, rows):
    ids, position_ids = ids_of(2, 100), positions(*rows) if rows else None
    reference = build("eager")(ids, position_ids) if dtype is torch.float32 else build("eager", dtype=dtype).float()(ids, position_ids)
    for attention in ATTENTION:
        if attention == "flash" and dtype is torch.float32: continue  # refused, see below
        logits = build(attention, dtype=dtype)(ids, position_ids)
        torch.testing.assert_close(logits.float(), reference, rtol=0, atol=atol)


@pytest.mark.parametrize("rows", [None, [[40, 60], [100]]])
@torch.no_grad()
def test_models_agree_under_autocast(kernel, rows):
    ids, position_ids = ids_of(2, 100), positions(*rows) if rows else None
    reference = build("eager")(ids, position_ids)
    for attention in ATTENTION:
        with torch.autocast("cpu", torch.bfloat16): logits = build(attention)(ids, position_ids)
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits.float(), reference, rtol=0, atol=0.35)


@torch.no_grad()
def test_flash_serves_a_cache_too(kernel):
    model, ids, cache = build("flash", dtype=torch.bfloat16), ids_of(2, 12), KVCache(TINY, 2, 12, torch.bfloat16)
    model(ids[:, :6], torch.arange(6).expand(2, 6), cache)
    step = model(torch.stack([ids[0, 6:7], ids[1, 4:5]]), torch.tensor([[6], [4]]), cache)[:, 0]
    whole = model(ids)
    torch.testing.assert_close(step, torch.stack([whole[0, 6], whole[1, 4]]), rtol=0, atol=0.25)


def test_flash_obeys_torchs_switch_for_determinism(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "flash_attn_varlen_func", lambda *args, deterministic, **kw: asked.append(deterministic) or varlen(*args, **kw))
    qkv = heads(5, dtype=torch.bfloat16)
    flash_attention(*qkv)
    torch.use_deterministic_algorithms(True)
    try: flash_attention(*qkv)
    finally: torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


def test_user_errors_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"attention='fast': choose one of auto, eager, sdpa, flash"): Transformer(TINY, "fast")
    monkeypatch.setattr(module, "flash_attn_varlen_func", None)
    with pytest.raises(ValueError, match=r"attention='flash' needs flash-attn.*pip install phi4_ref\[gpu\]"): Transformer(TINY, "flash")
    with pytest.raises(ValueError, match="not torch.float32"): flash_attention(*heads(5))


# Activation checkpointing

def saved_bytes(model, *args):
    "Bytes kept for the backward pass, weights aside."
    weights, kept = {w.untyped_storage().data_ptr() for w in model.parameters()}, {}
    def pack(x): kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(); return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): model(*args)
    return sum(n for at, n in kept.items() if at not in weights)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_changes_no_bit(kernel, attention, packed, autocast):
    if attention == "flash" and not autocast: pytest.skip("flash computes in bfloat16")
    ids, position_ids = ids_of(2, 70), positions([30, 40], [70]) if packed else None
    found = []
    for recompute in (False, True):
        model = build(attention)
        model.activation_checkpointing = recompute
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): loss = plain_lm_loss(model, dict(input_ids=ids, labels=ids, position_ids=position_ids))[0]
        loss.backward()
        found.append([loss, *(w.grad for w in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_checkpointing_keeps_one_input_a_layer():
    kept = {}
    for layers in (2, 6):
        for recompute in (False, True):
            model = build(num_hidden_layers=layers)
            model.activation_checkpointing = recompute
            kept[layers, recompute] = saved_bytes(model, ids_of(2, 100))
    assert kept[6, True] - kept[2, True] == 4 * 2 * 100 * 32 * 4, "four more layers keep four more float32 residual streams"
    assert kept[6, False] - kept[2, False] > 10 * (kept[6, True] - kept[2, True])


@pytest.mark.parametrize("attention", ["eager", "sdpa", "auto"])
def test_layers_share_one_mask_under_autocast(attention, monkeypatch):
    "In the type that they compute in, with the bits of a float32 mask that every layer rounds for itself."
    model, T = build(attention, num_hidden_layers=5), 96
    def run():
        masks, parts = set(), positions([40, 56])
        def pack(x):
            if x.shape[-2:] == (T, T) and x.isneginf().any(): masks.add(x.untyped_storage().data_ptr())
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16): out = model.hidden(ids_of(1, T), parts)
        return [out, *torch.autograd.grad(out.square().sum(), [w for w in model.parameters() if w is not model.lm_head.weight])], len(masks)
    ours, kept = run()
    monkeypatch.setattr(module, "document_mask", lambda parts, dtype: document_mask(parts, torch.float32))
    theirs, copies = run()
    assert kept <= 1 and all(torch.equal(a, b) for a, b in zip(ours, theirs)), (kept, copies)
    assert copies == 5 or attention == "eager"


def test_checkpointing_computes_each_layer_forward_twice():
    flops = []
    for recompute in (False, True):
        model = build("eager")
        model.activation_checkpointing = recompute
        with FlopCounterMode(display=False) as counter: model.hidden(ids_of(2, 50)).sum().backward()
        flops.append(counter.get_total_flops())
    last = 2 * 100 * 48 * 32 * 2  # the down projections: no gradient needs their output
    assert flops[1] - flops[0] == flops[0] // 3 - last  # forward 1, backward 2


# torch.compile

def graphs(fn, *args):
    torch._dynamo.reset()
    found = torch._dynamo.explain(fn)(*args)
    return found.graph_count, found.graph_break_count


@pytest.mark.parametrize("attention,recompute,packed", [("auto", False, False), ("auto", False, True), ("auto", True, False), ("auto", True, True),
    ("eager", False, True), ("sdpa", True, True)])
def test_training_forward_and_loss_are_one_graph(attention, recompute, packed):
    model = build(attention)
    model.activation_checkpointing = recompute
    batch = dict(input_ids=ids_of(2, 70), labels=ids_of(2, 70))
    if packed: batch["position_ids"] = positions([30, 40], [70])
    def loss(batch): return plain_lm_loss(model, batch)[0]
    assert graphs(loss, batch) == (1, 0)
    plain = torch.autograd.grad(loss(batch), list(model.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(batch)
    torch.testing.assert_close(compiled, loss(batch))
    for a, b in zip(torch.autograd.grad(compiled, list(model.parameters())), plain): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.library.custom_op("phi4_ref_tests::varlen", mutates_args=())
def varlen_op(q:Tensor, k:Tensor, v:Tensor, ends:Tensor, longest:int)->Tensor: return varlen(q, k, v, ends, ends, longest, longest, causal=True)
@varlen_op.register_fake
def _(q, k, v, ends, longest): return torch.empty_like(q)


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_flash_is_one_graph(monkeypatch, packed):
    "With the kernel as a custom operator, which is what it is in flash-attn; the number of documents is data, so dynamo must be told to trace through it."
    monkeypatch.setattr(module, "flash_attn_varlen_func", lambda q, k, v, ends, _, longest, __, causal, deterministic: varlen_op(q, k, v, ends, longest))
    model, args = build("flash", dtype=torch.bfloat16), (ids_of(2, 70), positions([30, 40], [70]) if packed else None)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=packed):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(compiled, model(*args))


def test_layers_compile_one_by_one():
    "Compiling the layer, not the model: one small graph for all of them, and `hidden`, which the losses call, uses it."
    torch._dynamo.reset()
    model, plain, ids = build(num_hidden_layers=4), build(num_hidden_layers=4), ids_of(2, 70)
    seen = []
    def backend(graph, inputs): seen.append(graph); return graph
    for layer in model.model.layers: layer.compile(fullgraph=True, backend=backend)
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        losses = [lm_loss(m, dict(input_ids=ids, labels=ids))[0] for m in (model, plain)]
        torch.testing.assert_close(*losses)
        grads = [torch.autograd.grad(l, m.model.layers[0].mlp.down_proj.weight)[0] for l, m in zip(losses, (model, plain))]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    assert len(seen) == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler on a CPU")
def test_inductor_agrees():
    torch._dynamo.reset()
    model, ids, position_ids = build(num_hidden_layers=1), ids_of(2, 70), positions([30, 40], [70])
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(ids, position_ids), model(ids, position_ids), rtol=1e-4, atol=1e-4)


# bfloat16

def test_norm_rounds_once():
    norm, x = RMSNorm(5120, 1e-5), (8 * torch.randn(4, 5120, generator=torch.Generator().manual_seed(0))).bfloat16()
    norm.weight.data.uniform_(0.5, 1.5)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert norm(x).dtype == torch.bfloat16 and (norm(x) != exact.bfloat16()).float().mean() < 1e-3


def test_rotary_positions_hold_at_16_thousand():
    cos, sin = rope_table(torch.tensor([[16_000]]), 128, 250_000.0)
    with torch.autocast("cpu", torch.bfloat16): assert rope_table(torch.tensor([[16_000]]), 128, 250_000.0)[0].dtype == cos.dtype == torch.float32
    angle = 16_000 / 250_000.0 ** (torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    torch.testing.assert_close(cos[0, 0, 0, :64].double(), angle.cos(), rtol=0, atol=2e-3)
    model, ids = build(dtype=torch.bfloat16), ids_of(1, 100)  # what counts is distance, in bfloat16 too
    with torch.no_grad(): near, far = model(ids, torch.arange(100)[None]), model(ids, 16_000 + torch.arange(100)[None])
    assert (near - far).abs().mean() < 0.05


@pytest.mark.parametrize("attention", ATTENTION)
def test_softmax_adds_up_in_float32(kernel, attention):
    "4,096 equal scores: weights summed in bfloat16 would stop growing at 256."
    q, k = torch.zeros(1, 2, 4096, 8, dtype=torch.bfloat16), torch.zeros(1, 1, 4096, 8, dtype=torch.bfloat16)
    out = ATTENTION[attention](q, k, torch.ones_like(k))
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=0.01)


@torch.no_grad()
def test_bfloat16_is_no_further_from_the_truth_than_transformers(theirs):
    ids, rough = ids_of(2, 200), build(dtype=torch.bfloat16)
    exact = Transformer(TINY, "eager").double()
    exact.load_state_dict(rough.state_dict())
    truth = exact(ids)
    error = lambda logits: (logits.double() - truth).abs().mean()
    assert error(rough(ids)) < 1.05 * error(theirs.bfloat16()(ids).logits)
    theirs.float()


# On a GPU with flash-attn

@pytest.mark.skipif(not HAS_FLASH, reason="needs a GPU and flash-attn")
@pytest.mark.parametrize("K,D", [(1, 64), (2, 128), (6, 128)])
@pytest.mark.parametrize("packed", [False, True])
def test_the_flash_kernel_agrees_with_eager(K, D, packed):
    rows = positions([100, 1, 399], [500]).cuda()
    qkv = heads(500, K=K, D=D, dtype=torch.bfloat16, device="cuda")
    qkv = [x.detach().requires_grad_() for x in qkv]
    exact = [x.detach().float().requires_grad_() for x in qkv]
    out = flash_attention(*qkv, cu_seqlens(rows) if packed else None)
    reference = eager_attention(*exact, document_mask(rows) if packed else None)
    torch.testing.assert_close(out.float(), reference, rtol=0, atol=0.02)
    out.float().square().sum().backward(); reference.square().sum().backward()
    for a, b in zip(qkv, exact): torch.testing.assert_close(a.grad.float(), b.grad, rtol=0.05, atol=0.1)


@pytest.mark.skipif(not HAS_FLASH, reason="needs a GPU and flash-attn")
def test_a_flash_model_on_a_gpu():
    config = replace(TINY, hidden_size=256)  # heads of 64
    ids, rows = ids_of(2, 100).cuda(), positions([40, 60], [100]).cuda()
    torch.manual_seed(0)
    model = Transformer(config, "flash").cuda().bfloat16()
    exact = Transformer(config, "eager").cuda().float()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        for position_ids in (None, rows): assert (model(ids, position_ids).float() - exact(ids, position_ids)).abs().mean() < 0.05 * exact(ids).std()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masked_sdpa_stays_fused_on_a_gpu():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    q, k, v = heads(512, K=2, D=64, dtype=torch.bfloat16, device="cuda")
    mask = document_mask(positions([200, 312]).cuda(), torch.bfloat16)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]): out = sdpa_attention(q, k, v, mask)  # no unfused fallback allowed
    torch.testing.assert_close(out, eager_attention(q, k, v, mask), rtol=0, atol=0.02)
