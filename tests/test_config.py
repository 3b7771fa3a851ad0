"The configuration: what is refused and how it says so, that every field is read, that the paper's settings are the paper's."
import json
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import yaml

from phi4_ref import paper, run
from phi4_ref.config import CONFIGS, Config, Files, FilesSource, Model, PairFiles, PivotalDPO, Section, WorldSource, load_config, override, parse_value
from phi4_ref.model.transformer import ModelConfig, Transformer
from phi4_ref.post.dpo import LOSSES
from phi4_ref.world import World
from record_reads import recording

NAMES = ("toy", "small", "phi4-14b")


@pytest.mark.parametrize("name", NAMES)
def test_the_files_load_and_survive_being_written(name, tmp_path):
    config = load_config(name)
    assert config.name == name and config.out == f"runs/{name}"
    (tmp_path/"again.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(tmp_path/"again.yaml") == config
    assert {p.stem for p in CONFIGS.glob("*.yaml")} == set(NAMES)


# --- refusals -------------------------------------------------------------------------------------------------------------

REFUSED = {
    "pretrain.lrr=1": "toy.yaml: pretrain.lrr: unknown key; did you mean lr?",
    "pretrian.lr=1": "toy.yaml: pretrian: unknown key; did you mean pretrain?",
    "collect.pagess=3": "toy.yaml: collect.pagess: unknown key; did you mean pages?",
    "teacher.warmth=1": "toy.yaml: teacher.warmth: unknown key; known keys: base_url, error_rate, kind, model",
    "pretrain.fractions.wiki=0.1": "toy.yaml: pretrain.fractions.wiki",
    "pretrain.lr=fast": "toy.yaml: pretrain.lr: Input should be a valid number, unable to parse string as a number (got 'fast')",
    "pretrain.tokens=1.5": "toy.yaml: pretrain.tokens: Input should be a valid integer",
    "out=5": "toy.yaml: out: Input should be a valid string (got 5)",
    "out=": "toy.yaml: out: Input should be a valid string (got None)",
    "curate.languages=en": "toy.yaml: curate.languages: Input should be a valid list (got 'en')",
    "curate.languages=[]": "toy.yaml: curate.languages: List should have at least 1 item",
    "dpo.controls=[none]": "toy.yaml: dpo.controls.0: Input should be 'shuffled' or 'full' (got 'none')",
    "sft=null": "toy.yaml: sft: Input should be a valid dictionary",
    "pretrain.batch_size=true": "toy.yaml: pretrain: batch_size should be a value, not true",
    "seed=no": "toy.yaml: the whole: seed should be a value, not false",
    "collect.pages=-4": "toy.yaml: collect.pages: Input should be greater than 0 (got -4)",
    "collect.max_number=3": "toy.yaml: collect.max_number: Input should be greater than or equal to 4 (got 3)",
    "collect.kind=moon": "toy.yaml: collect: Input tag 'moon'",
    "seed=-1": "toy.yaml: seed: Input should be greater than or equal to 0 (got -1)",
    "sft.warmup=1.5": "toy.yaml: sft.warmup: Input should be less than 1 (got 1.5)",
    "pretrain.lr=0": "toy.yaml: pretrain.lr: Input should be greater than 0 (got 0)",
    "pretrain.lr=nan": "toy.yaml: pretrain.lr: Input should be",
    "pretrain.lr=inf": "toy.yaml: pretrain.lr: Input should be a finite number (got inf)",
    "curate.min_quality=6": "toy.yaml: curate.min_quality: Input should be less than or equal to 5 (got 6)",
    "synth.votes=2": "toy.yaml: synth.votes: Input should be greater than or equal to 3 (got 2)",
    "dpo.refusal_fraction=1": "toy.yaml: dpo.refusal_fraction: Input should be less than 1 (got 1)",
    "dpo.loss=ppo": "toy.yaml: dpo.loss: Input should be 'sigmoid', 'ipo', 'cdpo', 'robust' or 'simpo' (got 'ppo')",
    "dpo.label_smoothing=high": "toy.yaml: dpo.label_smoothing: Input should be 'measured', or Input should be a valid number, unable to parse string as a number (got 'high')",
    "dpo.label_smoothing=0.1": "toy.yaml: dpo: label_smoothing 0.1 is for the losses cdpo and robust, and loss is sigmoid",
    "dpo.label_smoothing=0.5": "toy.yaml: dpo.label_smoothing: Input should be 'measured', or Input should be less than 0.5 (got 0.5)",
    "dpo.kl_weight=-1": "toy.yaml: dpo.kl_weight: Input should be greater than or equal to 0 (got -1)",
    "dpo.nll_weight=-0.1": "toy.yaml: dpo.nll_weight: Input should be greater than or equal to 0 (got -0.1)",
    "dpo.lora_rank=-1": "toy.yaml: dpo.lora_rank: Input should be greater than or equal to 0 (got -1)",
    "judge.gamma=2": "toy.yaml: judge: gamma 2.0 is for the loss simpo, and loss is sigmoid",
    "judge.rows=pair": "toy.yaml: judge.rows: unknown key; known keys: batch_size",
    "dpo.counts.maths=3": "toy.yaml: dpo.counts.maths: Input should be 'pts', 'problem', 'mcq', 'code', 'refusal' or 'safety' (got 'maths')",
    "dpo.counts={pts: 90, refusal: 10}": "toy.yaml: dpo: counts says how many refusal pairs, and so does refusal_fraction 0.05: set it to 0, or leave refusal out of counts",
    "judge.counts={judge_accuracy: 90, refusal: 5, safety: 5}": "toy.yaml: judge: counts says how many refusal pairs, and so does refusal_fraction 0.05: set it to 0, or leave refusal and safety out of counts",
    "dpo.counts={problem: 90, code: 10}": "toy.yaml: the whole: dpo.counts asks for pairs of code, and pts.kinds searches no such questions",
    "dpo.counts={pts: 90, code: 10}": "toy.yaml: dpo: counts asks for pts and for kinds of it: give pts, or the kinds",
    "pts.kinds=[maths]": "toy.yaml: pts.kinds.0: Input should be 'problem', 'mcq' or 'code' (got 'maths')",
    "judge.counts={pts: 90}": "toy.yaml: judge.counts.pts: Input should be 'judge_accuracy', 'judge_overall', 'refusal' or 'safety'",
    "judge.models=[teacher, gpt]": "toy.yaml: judge.models.1: Input should be 'teacher', 'sft' or 'dpo' (got 'gpt')",
    "judge.models=[]": "toy.yaml: judge.models: List should have at least 1 item",
    "judge.orders=3": "toy.yaml: judge.orders: Input should be 1 or 2 (got 3)",
    "judge.other_models=[gpt-4o]": "judge.other_models ['gpt-4o'] cannot answer: teacher.kind 'world' serves one teacher",
    "model.hidden_size=190": "toy.yaml: model: hidden_size 190 must be an even multiple of num_attention_heads 4",
    "model.num_key_value_heads=3": "toy.yaml: model: num_attention_heads 4 must be a multiple of num_key_value_heads 3",
    "compute.activation_checkpointing=[pts]": "toy.yaml: compute.activation_checkpointing.0: Input should be 'pretrain', 'midtrain', 'sft', 'dpo' or 'judge' (got 'pts')",
    "compute.activation_checkpointing=often": "toy.yaml: compute.activation_checkpointing: Input should be a valid boolean",
    "pretrain.tokens=100": "toy.yaml: pretrain: tokens 100 is less than one step of batch_size 8 x context 256",
    "pretrain.micro_batch_size=3": "toy.yaml: pretrain: batch_size 8 must be a multiple of micro_batch_size 3",
    "pretrain.fractions.web=0.5": "toy.yaml: pretrain: fractions sum to 1.3500, not 1",
    "midtrain.context=128": "midtrain.context 128 is below pretrain.context 256",
    "sft.context=4096": "sft.context 4096 exceeds midtrain.context",
    "pts.max_total=4096": "pts.max_total 4096 exceeds midtrain.context",
    "pts.low=0.9": "toy.yaml: pts: low 0.9 must be below high 0.8",
    "teacher.kind=openai": "toy.yaml: teacher: error_rate is a setting of kind 'world' only",
    "pretrain.lr": "cannot read the override 'pretrain.lr': write section.key=value",
    "=3": "cannot read the override '=3'",
    "seed.x=3": "cannot apply 'seed.x=3': seed is a value, not a section",
    "curate.languages=[en": "cannot read the value of 'curate.languages=[en'",
    "seed=2147483648": "toy.yaml: seed: Input should be less than 2147483648",
    "pretrain.warmup=1": "toy.yaml: pretrain.warmup: Input should be less than 1 (got 1)",
    "dpo.warmup=1": "toy.yaml: dpo.warmup: Input should be less than 1 (got 1)",
    "sft.betas=[0.9, 1]": "toy.yaml: sft.betas.1: Input should be less than 1 (got 1)",
    "pts.p_gap=1": "toy.yaml: pts.p_gap: Input should be less than 1 (got 1)",
    "pts.max_total=1": "toy.yaml: pts.max_total: Input should be greater than or equal to 8 (got 1)",
    "midtrain.long_tokens=1024": "midtrain.long_tokens 1024 must be below midtrain.context 1024",
    "midtrain.rope_theta=100": "midtrain.rope_theta 100 is below model.rope_theta 10000",
    "judge.models=[teacher]": "toy.yaml: judge: models ['teacher'] with samples 2 give one reply to a prompt, and the judge compares",
    "judge.max_new_tokens=100000": "judge.max_new_tokens 100000 leaves no room for a prompt in midtrain.context 1024",
    "evaluate.max_new_tokens=1024": "evaluate.max_new_tokens 1024 leaves no room for a prompt in midtrain.context 1024",
    "curate={min_quality: 3, min_quality: 4}": "cannot read the value of 'curate={min_quality: 3, min_quality: 4}': the key min_quality stands twice",
}


def test_safety_pairs_are_counted_where_some_are_collected():
    for section, changes in (("dpo", ["dpo.counts={pts: 90, safety: 10}", "dpo.refusal_fraction=0"]), ("judge", ["judge.counts={judge_accuracy: 90, safety: 10}", "judge.refusal_fraction=0"])):
        for name in ("toy", "small"):
            with pytest.raises(ValueError, match=f"{section}.counts asks for safety pairs, and collect.safety names no data set"): load_config(name, changes)
        assert load_config("small", [*changes, "collect.safety.path=pairs.jsonl"]).collect.safety.chosen == "chosen"


@pytest.mark.parametrize("change", REFUSED)
def test_refused_with_the_path(change):
    with pytest.raises(ValueError) as refused: load_config("toy", [change])
    assert REFUSED[change] in str(refused.value) and "pydantic" not in str(refused.value)


def test_layers_are_computed_again_in_the_stages_that_are_named():
    by_name = {stage.name: stage for stage in run.STAGES}
    for value, again in (("false", ()), ("true", ("pretrain", "midtrain", "sft", "dpo", "final")), ("[pretrain, dpo]", ("pretrain", "dpo")), ("[midtrain, judge]", ("midtrain", "final"))):
        config = load_config("toy", [f"compute.activation_checkpointing={value}"])
        for name in ("pretrain", "midtrain", "sft", "dpo", "final"): assert by_name[name].view(config).compute["activation_checkpointing"] is (name in again), (value, name)


def test_a_teacher_that_knows_only_the_world():
    with pytest.raises(ValueError, match="teacher.kind 'world' knows only the toy world"): load_config("small", ["teacher.kind=world"])


def test_keys_of_the_chosen_kind_are_suggested():
    with pytest.raises(ValueError, match="collect.people: unknown key; known keys: benchmarks, conversations, documents"): load_config("small", ["collect.people=3"])
    with pytest.raises(ValueError, match=r"collect.documents.web.pth: unknown key; did you mean path\?"): load_config("small", ["collect.documents.web.pth=a"])
    with pytest.raises(ValueError, match=r"collect.benchmarks.gsm8k.splitt: unknown key; did you mean split\?"): load_config("small", ["collect.benchmarks.gsm8k.splitt=a"])


@pytest.mark.parametrize("text, said", [("- a\n- b", "holds list, not sections"), ("", "holds NoneType"), ("a: [", "is not valid YAML"), ("\xe9", "is not valid YAML"), ("name: x", "model: is missing")])
def test_files_that_are_no_configuration(tmp_path, text, said):
    (tmp_path/"mine.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=said) as refused: load_config(tmp_path/"mine.yaml")
    assert "mine.yaml" in str(refused.value)


@pytest.mark.parametrize("line, said", [("seed: 5", "the key seed stands twice.*\n.*line 7[0-9]"), ("synth: {votes: 5}", "the key synth stands twice"), ("3: 4", "the key '3' is no word"), ("null: 4", "the key 'null' is no word"), ("on: 4", "the key 'on' is no word")])
def test_a_key_is_a_word_and_stands_once(tmp_path, line, said):
    (tmp_path/"mine.yaml").write_text((CONFIGS/"toy.yaml").read_text() + f"\n{line}\n")
    with pytest.raises(ValueError, match=f"mine.yaml is not valid YAML: {said}"): load_config(tmp_path/"mine.yaml")


def test_a_file_of_ones_own_is_named_by_its_path(tmp_path):
    (tmp_path/"config.yaml").write_text((CONFIGS/"toy.yaml").read_text())
    with pytest.raises(ValueError, match=f"{tmp_path}/config.yaml: seed: "): load_config(tmp_path/"config.yaml", ["seed=-1"])


def test_files_that_are_missing():
    with pytest.raises(ValueError, match="no configuration 'toi': choose one of phi4-14b, small, toy"): load_config("toi")
    with pytest.raises(ValueError, match="no configuration 'no.yaml'"): load_config("no.yaml")


def test_every_problem_is_listed_at_once():
    with pytest.raises(ValueError) as refused: load_config("toy", ["pretrain.lrr=1", "seed=-1", "collect.pages=0"])
    assert len(str(refused.value).splitlines()) == 3


def test_one_line_for_a_field_that_may_be_several_things():
    with pytest.raises(ValueError) as refused: load_config("toy", ["pts.segments=some", "dpo.label_smoothing=0.5"])
    assert len(str(refused.value).splitlines()) == 2 and "literal[" not in str(refused.value) and "constrained" not in str(refused.value)


def test_the_losses_are_those_that_there_are():
    assert get_args(PivotalDPO.model_fields["loss"].annotation) == tuple(LOSSES) and PivotalDPO.model_fields["loss"].default == "sigmoid"
    for loss, more in (("cdpo", "dpo.label_smoothing=0.1"), ("robust", "dpo.label_smoothing=0"), ("simpo", "dpo.gamma=2"), ("ipo", "dpo.nll_weight=0.1")): load_config("toy", [f"dpo.loss={loss}", more])


@pytest.mark.parametrize("loss", LOSSES)
def test_what_a_loss_does_not_read_is_refused(loss):
    for field, value, readers in (("label_smoothing", 0.1, ("cdpo", "robust")), ("gamma", 2.0, ("simpo",))):
        changes = [f"dpo.loss={loss}", f"dpo.{field}={value}"]
        if loss in readers: assert getattr(load_config("toy", changes).dpo, field) == value
        else:
            with pytest.raises(ValueError, match=f"toy.yaml: dpo: {field} {value} is for the loss.*, and loss is {loss}"): load_config("toy", changes)


def test_what_a_file_leaves_out_is_the_papers_loss_and_the_plain_way():
    values = yaml.safe_load((CONFIGS/"toy.yaml").read_text())
    for name in ("pts", "dpo", "judge"):
        fields = Config.model_fields[name].annotation.model_fields
        values[name] = {k: v for k, v in values[name].items() if fields[k].is_required()}
    left = Config(**values)
    for section in (left.dpo, left.judge):
        assert (section.loss, section.label_smoothing, section.gamma, section.nll_weight, section.lora_rank, section.counts, section.micro_batch_size) == ("sigmoid", "measured", 1, 0, 0, None, None)
    assert (left.dpo.rows, left.judge.models, left.judge.other_models, left.judge.orders) == ("pair", ["teacher", "dpo"], [], 1)
    assert (left.pts.segments, left.pts.confirm_samples, left.pts.fdr) == (1, 0, 0.05)


def test_values_read_as_numbers_first():
    assert [parse_value(t) for t in ("3e-4", "-2", "1e6", "[en, de]", "null", "runs/a")] == [3e-4, -2, 1e6, ["en", "de"], None, "runs/a"]
    assert override({}, ["a.b.c=1", "a.b.d=2"]) == {"a": {"b": {"c": 1, "d": 2}}}
    assert override({"dpo": {"counts": None}}, ["dpo.counts.pts=9"]) == {"dpo": {"counts": {"pts": 9}}}  # as a written configuration has it
    assert load_config("toy", ["pretrain.tokens=1e6"]).pretrain.tokens == 1_000_000


def test_a_configuration_does_not_change():
    with pytest.raises(ValueError, match="frozen"): load_config("toy").pretrain.lr = 1


# --- every field is read ----------------------------------------------------------------------------------------------------

def sections(kind):
    "A section class and all below it."
    found, todo = {kind}, [f.annotation for f in kind.model_fields.values()]
    while todo:
        annotation = todo.pop()
        if isinstance(annotation, type) and issubclass(annotation, Section): found |= sections(annotation)
        else: todo += getattr(annotation, "__args__", ())
    return found


def leaves():
    "`Section.field` of everything a person can set."
    inner = {(kind, name) for kind in sections(Config) for name, field in kind.model_fields.items() if any(s.__name__ in str(field.annotation) for s in sections(Config))}
    return {f"{kind.__name__}.{name}" for kind in sections(Config) for name in kind.model_fields if (kind, name) not in inner}


class Watched(dict):
    "Settings as plain dicts that note which keys the code asks for."
    def __init__(self, values, reads):
        super().__init__({key: Watched(value, reads) if isinstance(value, dict) else value for key, value in values.items()})
        self.kind, self.reads = "FilesSource" if "kind" in values else "PairFiles" if "chosen" in values else "Files", reads

    def __getitem__(self, key):
        self.reads.add(f"{self.kind}.{key}")
        return super().__getitem__(key)


def files_source(folder):
    "A source of kind files whose every field matters."
    def write(name, *rows): (folder/f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows))); return {"path": str(folder/f"{name}.jsonl")}
    question = {"q": "How many?", "a": "4"}, {"q": "And now?", "a": "5"}
    return {"kind": "files", "pages": write("pages", {"html": "<p>One page about rivers.</p>"}) | {"text": "html"},
            "documents": {"web": write("web", *({"text": f"A document, number {i}."} for i in range(5))) | {"limit": 3}},
            "questions": write("questions", *question) | {"text": "q", "answer": "a"}, "trivia": write("trivia", *question) | {"text": "q", "answer": "a"},
            "conversations": write("chats", {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}),
            "safety": write("safety", {"q": "How?", "good": "No.", "bad": "So."}) | {"prompt": "q", "chosen": "good", "rejected": "bad"},
            "benchmarks": {"sums": write("sums", *question) | {"text": "q", "answer": "a"}}}


def test_files_are_read_field_by_field(tmp_path, monkeypatch):
    source, plain = FilesSource(**files_source(tmp_path)), FilesSource.model_dump
    with recording() as reads:
        monkeypatch.setattr(FilesSource, "model_dump", lambda self, **kw: Watched(plain(self, **kw), reads))
        counts = run.collect(SimpleNamespace(seed=0, collect=source), {}, tmp_path/"out")
    assert counts == {"pages": 1, "documents": 3, "questions": 2, "conversations": 1, "trivia": 2, "safety": 1, "benchmark items": 2}
    assert {f"{kind.__name__}.{field}" for kind in (Files, PairFiles, FilesSource) for field in kind.model_fields} <= reads


WORLD = dict(people=20, pages=60, max_number=5, seed_questions=30, conversations=20, books=20, functions=20, items=6)


def tables(**changes):
    world = World(0, **{**WORLD, **changes})
    return {"pages": world.pages(), "books": world.books(), "code": world.code(), "seed_questions": world.seed_questions(), "conversations": world.organic_conversations(),
            "trivia": world.trivia(), "benchmarks": world.benchmarks()}


def test_every_field_of_the_world_changes_it():
    before = tables()
    for field in set(WorldSource.model_fields) - {"kind"}: assert tables(**{field: WORLD[field] + 3}) != before, field
    assert set(WORLD) == set(WorldSource.model_fields) - {"kind"}


def test_every_field_of_the_model_changes_it():
    shape = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, rope_theta=100.0, rms_norm_eps=1e-5)
    other = dict(vocab_size=41, hidden_size=64, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=1, intermediate_size=32, rope_theta=9.0, rms_norm_eps=1e-1)
    def logits(**changes):
        torch.manual_seed(0)
        with torch.no_grad(): return Transformer(ModelConfig(**{**shape, **changes}, max_position_embeddings=16))(torch.arange(12)[None])
    assert set(other) == set(Model.model_fields)
    for field, value in other.items():
        a, b = logits(), logits(**{field: value})
        assert a.shape != b.shape or not torch.allclose(a, b), field


def test_the_teacher_is_the_one_named(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    remote = load_config("small")
    with recording() as reads: llm = run.make_teacher(SimpleNamespace(seed=0, teacher=remote.teacher, collect=remote.collect), None)
    assert llm.name == remote.teacher.model and str(llm.client.base_url).startswith(remote.teacher.base_url)
    assert {"Teacher.kind", "Teacher.model", "Teacher.base_url"} <= reads


def test_every_field_is_read(tiny_reads):
    "What one run reads, and what the tests above show of the sections that are handed on whole or lie idle in the toy."
    whole = {"WorldSource": WORLD, "Files": Files.model_fields, "FilesSource": FilesSource.model_fields, "PairFiles": PairFiles.model_fields, "Model": Model.model_fields}
    shown = {f"{kind}.{field}" for kind, fields in whole.items() for field in fields} | {"Teacher.base_url"}
    unread = leaves() - tiny_reads - shown
    assert len(leaves()) > 100 and not unread, sorted(unread)


# --- the paper ------------------------------------------------------------------------------------------------------------

def test_phi4_14b_is_the_papers():
    big = load_config("phi4-14b")
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "rms_norm_eps"):
        assert getattr(big.model, key) == paper.MODEL[key], key
    assert (big.pretrain.tokens, big.pretrain.context, big.pretrain.batch_size) == tuple(paper.PRETRAINING[k] for k in ("tokens", "context", "batch_sequences"))
    assert (big.pretrain.lr, big.pretrain.weight_decay) == (paper.PRETRAINING["lr"], paper.PRETRAINING["weight_decay"])
    assert (big.midtrain.tokens, big.midtrain.context, big.midtrain.rope_theta, big.midtrain.long_fraction) == tuple(paper.MIDTRAINING[k] for k in ("tokens", "context", "rope_theta", "long_fraction"))
    assert big.midtrain.long_tokens == paper.MIDTRAINING["long_over"] and big.midtrain.lr == pytest.approx(paper.MIDTRAINING["lr_ratio"] * big.pretrain.lr)
    assert (big.sft.lr, big.sft.tokens) == (paper.SFT["lr"], paper.SFT["tokens"])
    assert (big.pts.low, big.pts.high) == (paper.PTS["p_min"], paper.PTS["p_max"])
    assert big.dpo.counts == dict(problem=paper.TABLE_7["math"], code=paper.TABLE_7["python"], refusal=paper.TABLE_7["unknown + safety"] / 2, safety=paper.TABLE_7["unknown + safety"] / 2)
    for section, safety in ((big.dpo, (big.dpo.counts["refusal"] + big.dpo.counts["safety"]) / sum(big.dpo.counts.values())), (big.judge, big.judge.refusal_fraction)): assert paper.DPO["safety_fraction_min"] <= safety <= paper.DPO["safety_fraction_max"] and (section.kl_weight, section.loss, section.lora_rank, section.nll_weight) == (0, "sigmoid", 0, 0)
    assert big.judge.counts == {f"judge_{kind}": paper.TABLE_8[f"any-vs-any {kind}"] for kind in ("accuracy", "overall")}


@pytest.mark.parametrize("name", NAMES)
def test_the_mixture_is_table_5(name):
    assert load_config(name).pretrain.fractions == {source: row["fraction"] for source, row in paper.TABLE_5.items()}
