"The plan: its memory against measured memory, its operations against published runs, its refusals as a user reads them."
import pytest
import torch
from typer.testing import CliRunner

from phi4_ref.cli import app
from phi4_ref.config import CONFIGS, load_config
from phi4_ref.model.transformer import PHI4_14B, ModelConfig, Transformer, count_parameters, flops_per_token
from phi4_ref.train import plan as planning
from phi4_ref.train.devices import find_device
from phi4_ref.train.loop import Objective, TrainSettings, lm_loss, make_optimizer
from phi4_ref.train.plan import LiveBytes, checkpoint_layers, layouts, measure_saved, memory, peak_bytes, plan, saved_bytes, shape_of, state_bytes

SHAPES = {"wide": ModelConfig(1000, 256, 3, 4, 2, 704, 128), "deep": ModelConfig(500, 96, 10, 6, 2, 256, 128), "vocabulary": ModelConfig(8000, 128, 2, 4, 4, 352, 256)}
BATCHES = [(1, 128), (9, 128)]  # the second needs two chunks of the loss
TOLERANCE = 0.03


def batch_of(shape, rows, context):
    ids = torch.randint(0, shape.vocab_size, (rows, context), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def measured_peak(model, batch, bf16):
    "Of the second micro-batch of a step, beyond weights and gradients."
    run = Objective(model, lm_loss, bf16)
    run(batch)[0].backward()
    with LiveBytes() as live:
        live.alive.update({p.untyped_storage()._cdata: None for q in model.parameters() for p in (q, q.grad)})
        run(batch)[0].backward()
    return live.peak


# --- memory ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("again", [False, True], ids=["all saved", "checkpointed"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_activations_and_the_peak_are_those_of_the_real_model(name, bf16, again):
    shape, element = SHAPES[name], 2 if bf16 else 4
    for rows, context in BATCHES:
        model = Transformer(shape, "sdpa")
        if again: checkpoint_layers(model)
        batch, tokens = batch_of(shape, rows, context), rows * context
        assert saved_bytes(shape, tokens, again, element) == pytest.approx(measure_saved(model, batch, bf16), rel=TOLERANCE)
        assert peak_bytes(shape, tokens, again, element) == pytest.approx(measured_peak(model, batch, bf16), rel=TOLERANCE)


def test_weights_gradients_and_moments_are_exact():
    shape = SHAPES["deep"]
    model = Transformer(shape)
    optimizer = make_optimizer(model, TrainSettings(lr=1e-3))
    lm_loss(model, batch_of(shape, 1, 16))[0].backward()
    optimizer.step()
    held = {"weights": sum(p.nbytes for p in model.parameters()), "gradients": sum(p.grad.nbytes for p in model.parameters()),
            "optimizer": sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)}
    assert state_bytes(shape, planning.STRATEGIES["DDP"], 1) == held


@pytest.mark.parametrize("shape", [PHI4_14B, shape_of(load_config("small")), shape_of(load_config("toy"))])
def test_parameters_are_counted_right(shape):
    with torch.device("meta"): model = Transformer(shape)
    assert planning.parameters(shape)["all"] == count_parameters(model)


def test_what_is_divided_shrinks_with_the_number_of_gpus():
    for name, strategy in planning.STRATEGIES.items():
        few, many = (memory(PHI4_14B, strategy, n, 4096, True) for n in (16, 64))
        for part in few: assert many[part] <= few[part]
        assert (sum(many.values()) < sum(few.values())) == ("all" in (strategy.weights, strategy.gradients, strategy.optimizer)), name


def test_one_gpu_has_nothing_to_share_or_transfer():
    [row] = layouts(shape_of(load_config("small")), load_config("small").pretrain, 1, find_device("H100"))
    assert row["transfer"] == 0 and "buckets" not in row["parts"] and row["fits"]


# --- operations and time --------------------------------------------------------------------------------------------------

def test_published_runs():
    llama = ModelConfig(128_256, 16384, 126, 128, 8, 53248, 8192)
    assert planning.parameters(llama)["all"] == pytest.approx(405e9, rel=.01)
    assert .36 < planning.implied_mfu(flops_per_token(llama, 8192), 15.6e12, 30.84e6, find_device("H100").peak_bf16_flops) < .43
    phi = planning.implied_mfu(flops_per_token(PHI4_14B, 4096), 9.8e12, 1920 * 21 * 24, find_device("H100").peak_bf16_flops)
    made = plan(load_config("phi4-14b", ["pretrain.tokens=9800000000000"]), 1920, "H100", mfu=phi)
    assert made.times[0]["days"] == pytest.approx(21)


def test_time_and_cost_follow_from_operations():
    made = plan(load_config("small"), 1, "H100", mfu=.25, price=3)
    row = made.times[0]
    seconds = load_config("small").pretrain.tokens * flops_per_token(shape_of(made.config), 2048) / (.25 * find_device("H100").peak_bf16_flops)
    assert row["days"] == pytest.approx(seconds / 86400) and row["dollars"] == pytest.approx(seconds / 3600 * 3)
    assert row["tokens_per_s"] * seconds == pytest.approx(made.config.pretrain.tokens)


def test_small_is_a_matter_of_hours_on_one_gpu():
    made = plan(load_config("small"), 1, "H100", mfu=.2)
    assert sum(row["days"] for row in made.times) < 0.5
    assert all(planning.recommended(rows) for rows in made.layouts.values())


def test_the_papers_run_as_it_was_recomputed_by_hand():
    made = plan(load_config("phi4-14b"), 1920, "H100")
    pretrain, midtrain = made.times[:2]
    assert pretrain["flops"] == pytest.approx(9.49e23, rel=1e-3) and midtrain["flops"] == pytest.approx(3.13e22, rel=1e-3)
    assert pretrain["days"] == pytest.approx(14.46, abs=.01) and pretrain["dollars"] == pytest.approx(1.667e6, rel=1e-3)
    assert midtrain["gpus"] == 1440 and midtrain["days"] * 24 == pytest.approx(15.25, abs=.01)


def test_chats_with_a_row_each_take_many_more_steps():
    packed, alone = (planning.stages(load_config("phi4-14b", [f"sft.pack={value}"]), 256)[2] for value in ("true", "false"))
    assert packed["steps"] == 8_000_000_000 // (256 * 16384) and alone["steps"] == 8_000_000_000 // (256 * planning.CHAT) > 30_000
    assert alone["tokens"] == packed["tokens"] and any("sft: a row holds one chat" in line for line in plan(load_config("phi4-14b", ["sft.pack=false"]), 1920, "H100").warnings)


# --- bytes and hops ---------------------------------------------------------------------------------------------------------

def test_a_ring_has_a_hop_for_each_gpu_but_one():
    assert planning.ring_seconds(1920, 8, (1, 1)) == 1919 and planning.ring_seconds(1920, 8, (0, 1)) == 239 and planning.tree_seconds(8, 8, (1, 1)) == 14
    a_hop = planning.latency_seconds(PHI4_14B, "FSDP", 1920, 3, hop=(1, 1))
    assert a_hop == 369 * 1919  # 41 groups, 3 collectives, 3 micro-batches
    assert planning.latency_seconds(PHI4_14B, "HSDP", 1920, 3, hop=(1, 0), machines=1) == 369 * 7


def test_flat_fsdp_over_many_gpus_is_not_recommended():
    config, made = load_config("phi4-14b"), plan(load_config("phi4-14b"), 1920, "H100")
    best = planning.recommended(made.layouts["pretrain"])
    assert (best["strategy"], best["group"], best["checkpointing"]) == ("HSDP", 32, False)
    step = made.times[0]["days"] * 86400 / made.times[0]["steps"]
    [flat] = [row for row in made.layouts["pretrain"] if row["strategy"] == "FSDP"]
    assert flat["fits"] and flat["latency"] > step > 2 * (best["transfer"] + best["latency"])
    assert planning.recommended(plan(config, 1920, "H100", hop_us=0, network_hop_us=0).layouts["pretrain"])["strategy"] == "FSDP"


def test_what_is_shipped_to_launch_is_in_the_plan():
    named = {"ddp": "DDP", "fsdp2": "FSDP", "fsdp2_zero2": "FSDP2-ZeRO-2", "hsdp": "HSDP"}
    shipped = {path.stem for path in (CONFIGS/"accelerate").glob("*.yaml")}
    assert set(named) <= shipped and set(named.values()) <= set(planning.LAUNCHED) <= {"one GPU", *planning.STRATEGIES}


# --- recomputing ------------------------------------------------------------------------------------------------------------

def test_the_shipped_configuration_recomputes_where_the_plan_does():
    made = plan(load_config("phi4-14b"), 1920, "H100")
    assert [planning.recommended(made.layouts[name])["checkpointing"] for name in made.layouts] == [False, True, True]
    assert not any("activation" in line for line in made.warnings)
    everywhere, nowhere = (plan(load_config("phi4-14b", [f"compute.activation_checkpointing={value}"]), 1920, "H100").warnings for value in ("true", "false"))
    assert any(line.startswith("pretrain fits on HSDP of 32 without activation checkpointing") for line in everywhere)
    assert [line.split()[0] for line in nowhere if "only with activation checkpointing" in line] == ["midtrain", "sft"]


def test_recomputing_keeps_the_hardware_busier_at_the_same_mfu():
    "Counted on the real model: forward passes of its layers, once more."
    assert planning.recomputing(PHI4_14B, 4096) == pytest.approx(1 + (94.938 - 6 * .513802) / 94.938 / 3, rel=1e-4)
    made = plan(load_config("phi4-14b"), 1920, "H100", mfu=.4)
    text = planning.time_text(made)
    assert [line.split()[8] for line in text.splitlines() if line.split()[0] in ("pretrain", "midtrain", "sft")] == ["40%", "53%", "53%"]
    assert "midtrain: with layers computed twice 40% MFU is 53% of the hardware; at 40% of it the stage takes 20 h" in made.warnings


# --- the command ----------------------------------------------------------------------------------------------------------

def said(monkeypatch, *args):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    done = CliRunner().invoke(app, ["plan", *args])
    return done.exit_code, done.stdout, done.stderr


def test_a_plan_is_printed_with_its_sources(monkeypatch):
    code, out, err = said(monkeypatch, "phi4-14b", "--gpus", "1920", "--gpu", "H100")
    assert code == 0 and not err
    for text in ("14,659,507,200", "423,855", "ZeRO-2", "FSDP", "recommended: ", "midtrain: batch_size 1440 keeps 1,440 of the 1,920 GPUs busy", "data sheet", "phi-4 §3", "ours", "70.0 d on 1 GPU", "shards: 13 TB at 4 bytes an id",
                 "validation: 1.2 h", "58.6 GB for the initial weights, on the first machine only", "recommended: HSDP of 32 GPUs, 60 copies (hsdp.yaml)", "the rent of the others meanwhile is $18,306", "tuning.cc"): assert text in out
    assert "14 h on 120 GPUs, each searching its share" in said(monkeypatch, "phi4-14b", "--gpus", "1920", "--engines", "120")[1]


@pytest.mark.parametrize("args, message", [
    (["phi4-14b", "--gpus", "64", "--gpu", "H900"], "no GPU 'H900' in the table; known: A100 SXM"),
    (["phi4-14b", "--gpus", "64", "--gpu", "H900"], "give --peak-tflops (dense bf16) and --memory-gb"),
    (["phi4-14b", "--gpus", "1000"], "pretrain.batch_size 5760 cannot be shared by 1000 GPUs: take 960 or 1152 GPUs, or another pretrain.batch_size"),
    (["phi4-14b", "--gpus", "1"], "pretrain fits on no layout of 1 GPU: it needs at least"),
    (["phi4-14b", "--gpus", "6000"], "take 5760 GPUs, or another"),
    (["phi4-14b", "--gpus", "1920", "--mfu", "40"], "an MFU above 0 and at most 1"),
    (["small", "pretrain.lrr=1"], "pretrain.lrr: unknown key; did you mean lr?"),
    (["toy", "--peak-tflops", "0"], "peak_tflops 0: give a number above 0"),
    (["toy", "--peak-tflops", "inf"], "peak_tflops inf: give a number above 0"),
    (["toy", "--gpu", "X", "--peak-tflops", "-5", "--memory-gb", "80"], "peak_tflops -5: give a number above 0"),
    (["toy", "--memory-gb", "-3"], "memory_gb -3: give a number above 0"),
    (["toy", "--node", "0"], "node 0: give a number above 0"),
    (["toy", "--network-gbits", "nan"], "network_gbits nan: give a number above 0"),
    (["toy", "--price", "-1"], "price -1: give dollars a GPU hour"),
    (["toy", "--price", "nan"], "price nan: give dollars a GPU hour"),
    (["toy", "--gradient-bytes", "3"], "gradient_bytes 3: give 4 for float32, or 2 for bf16"),
    (["toy", "--moment-bytes", "8"], "moment_bytes 8: give 4 for float32, or 2 for bf16"),
])
def test_mistakes_are_one_line_and_status_2(monkeypatch, args, message):
    code, out, err = said(monkeypatch, *args)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_a_gpu_given_by_its_numbers(monkeypatch):
    code, out, err = said(monkeypatch, "small", "--gpu", "my own", "--peak-tflops", "100", "--memory-gb", "32")
    assert code == 0 and "100 TFLOP/s" in out and "32 GB" in out


def test_given_shards_are_counted(tmp_path):
    "What they hold, and how often the budget reads it; not yet made, the plan says so and goes on."
    from phi4_ref.data.shards import load_shards, write_shards
    from phi4_ref.model.tokenizer import train_tokenizer
    tokenizer = train_tokenizer(["plum and plum"] * 3, 300)
    write_shards([{"text": "a plum " * 200, "source": "web"}, {"text": "a plum " * 50, "source": "code"}], tokenizer, tmp_path/"shards", workers=1)
    tokens = {source: store.size for source, store in load_shards(tmp_path/"shards").items()}
    given = ["pretrain.tokenizer=any", "pretrain.fractions={web: 0.5, code: 0.25, synthetic: 0.25}", "pretrain.tokens=1000000"]
    lines = planning.epochs_text(load_config("toy", [*given, f"pretrain.shards=[{tmp_path}/shards]"])).splitlines()
    assert planning.given_tokens(load_config("toy", [*given, f"pretrain.shards=[{tmp_path}/shards]"])) == tokens | {"synthetic": 0}
    assert lines[1] == f"given shards: web {tokens['web']} ({500_000 / tokens['web']:.3g} epochs, Table 5 has 1.2), code {tokens['code']} ({250_000 / tokens['code']:.3g} epochs, Table 5 has 2.4), synthetic 0 (inf epochs, Table 5 has 13.8)"
    assert planning.epochs_text(load_config("toy", [*given, "pretrain.shards=[nowhere]"])).splitlines()[1] == "given shards: not read (no directory nowhere with shards)"
    assert len(planning.epochs_text(load_config("toy")).splitlines()) == 1
