"""The benchmarks run on tiny sizes, and their figures are what they say."""

import json
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import rlt.sampling.shared_prefix
from benchmarks import (
    common,
    decode,
    gpu_check,
    memory,
    peers,
    reward_scoring,
    scaling,
    sft,
    startup,
    teacher_rl_step,
    update,
)
from benchmarks.floor import Floor, decode_floor, prefill_floor, update_floor
from benchmarks.machine import read_bytes_per_second
from benchmarks.work import compose_stage, load, problems_of, random_groups
from rlt.llm.flop_count import matmul_flops_per_second
from rlt.llm.logprobs import shares_prefixes

TINY = ["--model", "nano", "--repeats", "1", "--prompt-tokens", "24", "--new-tokens", "4"]
WRITTEN = {"benchmark", "command", "machine", "settings", "rows", "ratios"}
TIMES = {"arm", "seconds", "fastest", "slowest"}


def run(benchmark: Any, tmp_path: Path, *options: str) -> dict[str, Any]:
    """Run one and return what it wrote."""
    benchmark.main([*options, "--output", str(tmp_path)])
    name = benchmark.__name__.rpartition(".")[2]
    written: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
    assert written["benchmark"] == name and set(written) >= WRITTEN
    machine = written["machine"]
    # Both rates are measured once a process, so that they are known here.
    cpu = torch.device("cpu")
    assert machine["matmul_flops_per_second"] == matmul_flops_per_second(cpu, torch.float32)
    assert machine["read_bytes_per_second"] == read_bytes_per_second(cpu)
    assert {"cpu", "cores", "torch_threads", "versions", "git", "date"} <= set(machine)
    return written


# --- every script ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label",
    [
        "nano, RL, full",  # a tiny model weighs nothing: both are what the program itself takes
        *(
            pytest.param(label, marks=pytest.mark.slow)
            for label in ("SmolLM2, RL, LoRA", "SmolLM2, RL, full, 4096", "SmolLM2, SFT, full")
        ),
    ],
)
def test_memory_is_as_estimated(label: str, tmp_path: Path) -> None:
    row = run(memory, tmp_path, "--only", label)["rows"][0]
    assert row["estimated"] == pytest.approx(row["measured"], rel=0.15)


def test_gpu_check_writes_its_page_on_a_cpu(tmp_path: Path) -> None:
    lengths = ["--prompt-tokens", "24", "--new-tokens", "4"]
    written = run(
        gpu_check, tmp_path, *lengths, "hardware=cpu", "--models", "nano", "--adapters", "lora"
    )
    row, (exact,) = (
        written["rows"][0],
        written["exactness"],
    )  # trl comes after, where it is installed
    assert all(row[phase] > 0 for phase in ("rollout", "reward", "update", "mfu"))
    assert all(0 <= exact[name] < 1e-4 for name in gpu_check.EXACTNESS)
    page = (tmp_path / "gpu_check.md").read_text()
    assert page.count("| rlt nano lora |") == 3


def test_decode(tmp_path: Path) -> None:
    written = run(decode, tmp_path, *TINY, "--completions", "2", "3")
    rows = [f"{arm}, {n} rows" for n in (4, 6) for arm in ("generate", "rollout")]
    assert [row["arm"] for row in written["rows"]] == rows
    assert all(
        {*TIMES, "first_token_seconds", "ms_per_token_step"} == set(r) for r in written["rows"]
    )
    generate, rollout = written["rows"][:2]
    expected = generate["seconds"] / rollout["seconds"]
    assert written["ratios"]["rollout against generate, 4 rows"] == pytest.approx(expected)
    assert set(written["floor_ms_per_token_step"]) == {"4 rows", "6 rows"}
    assert written["settings"]["prompt_tokens"] == [24, 24]


def test_reward_scoring(tmp_path: Path) -> None:
    written = run(reward_scoring, tmp_path, *TINY)
    arms = ["one by one, full logits", "scorer and teacher", "scorer"]
    assert [row["arm"] for row in written["rows"]] == arms
    assert all({*TIMES, "seconds_per_completion"} == set(row) for row in written["rows"])
    assert 0 <= written["largest_difference_of_rewards"] < 1e-4
    assert {"scorer against one by one", "scorer and teacher against one by one"} == set(
        written["ratios"]
    )
    assert 0 < written["flops_utilisation"]["scorer"] < 1 and written["floor_seconds"] > 0


def test_update(tmp_path: Path) -> None:
    written = run(update, tmp_path, *TINY)
    arms = ["unshared", "shared", "unshared, policy alone", "shared, policy alone"]
    assert [row["arm"] for row in written["rows"]] == arms
    assert 0 < written["relative_difference_of_gradients"] < 1e-4
    # The reference's forward is one of four.
    floor = written["floor_seconds"]
    assert floor["shared"] == pytest.approx(floor["shared, policy alone"] * 4 / 3)


def test_scaling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "TINY_CHANGES", [{}, {"vocabulary": 256}])
    written = run(scaling, tmp_path, "--model", "nano", "--repeats", "1")
    base, wider = written["rows"]
    assert (base["arm"], wider["arm"]) == ("base", "vocabulary 256")
    assert wider["parameters"] - base["parameters"] == (256 - 64) * 32  # tied embeddings
    with pytest.raises(SystemExit, match="2"):
        scaling.main(["--model", "micro"])
    assert "--model=micro: choose random or nano" in capsys.readouterr().err


def test_arms_of_rlt_in_this_process(tmp_path: Path) -> None:
    file = tmp_path / "arm.json"
    arm = ["--arm", "rlt", "--arm-file", str(file), "--steps", "2"]
    teacher_rl_step.main([*TINY, *arm, "--completions", "2"])
    one = json.loads(file.read_text())
    assert len(one["steps"]) == 3 and one["peak_bytes"] > 2**20
    adapted = tmp_path / "lora.json"
    lora = ["--arm", "rlt+lora", "--arm-file", str(adapted), "--steps", "2"]
    teacher_rl_step.main([*TINY, *lora, "--completions", "2"])
    assert len(json.loads(adapted.read_text())["steps"]) == 3
    phases = sum(one["steps"][0][phase] for phase in teacher_rl_step.PHASES)
    assert 0 < phases <= one["steps"][0]["seconds"]
    row = teacher_rl_step.line("rlt", [one, one])
    assert row["slowest"] == max(step["seconds"] for step in one["steps"][1:])
    sft.main(["--model", "nano", "--rows", "2", *arm])
    assert len(json.loads(file.read_text())["steps"]) == 3


def test_the_first_line_is_the_first_with_text() -> None:
    late = "import time; print(); time.sleep(0.3); print('ready', flush=True); time.sleep(0.2)"
    seconds = startup.run([sys.executable, "-c", late])
    assert 0.3 <= seconds["first_line_seconds"] <= seconds["seconds"] - 0.15
    with pytest.raises(RuntimeError, match="no such option"):
        startup.run([sys.executable, "-c", "raise SystemExit('no such option')"])


# --- what they are made of ------------------------------------------------------------------------


def test_arms_take_turns_after_a_round_to_warm_up() -> None:
    order: list[str] = []
    arms = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.01))}
    seconds = common.alternate(arms, 2)
    assert order == ["a", "b"] * 3
    assert all(len(values) == 2 for values in seconds.values())
    assert min(seconds["b"]) >= 0.01


def test_ratios_against_the_peer() -> None:
    rows = [{"seconds": 8.0, "peak_gb": 3.0}, {"seconds": 2.0, "peak_gb": 1.5}]
    assert list(common.against_peer(rows, "x").values()) == [4.0, 2.0]
    assert common.against_peer(rows[:1], "x") == {}


def test_peers_are_left_out_where_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(common, "run_arm", lambda name, args, arm: ran.append(arm) or {"arm": arm})
    for installed in (None, "1.16.0"):
        monkeypatch.setattr(common, "installed", lambda package, found=installed: found)
        common.run_arms("sft", Namespace(repeats=2), common.peer_and_rlt())
    assert ran == ["rlt", "rlt", "trl", "rlt", "trl", "rlt"]


def test_unshared_prefixes_are_unshared_everywhere_and_only_there() -> None:
    model = load("teacher_rl", "nano").model
    assert rlt.sampling.shared_prefix.shares_prefixes(model)
    with update.unshared_prefixes():
        assert not rlt.sampling.shared_prefix.shares_prefixes(model)
        assert not rlt.llm.logprobs.shares_prefixes(model)
        assert not rlt.training.policy.shares_prefixes(model)
    assert rlt.llm.logprobs.shares_prefixes is shares_prefixes


def test_prompts_reach_their_length_and_completions_have_it() -> None:
    renderer = load("teacher_rl", "nano").renderer
    first, second = problems_of(renderer, 2, 50)
    assert first.question != second.question
    assert len(renderer.teacher_prompt(first)) == len(renderer.teacher_prompt(second)) == 50
    group = random_groups(renderer, 2, 3, 50, 7)
    assert [len(ids) for _, ids in group.rows] == [7] * 6
    assert not {*renderer.tokenizer.all_special_ids} & {i for _, ids in group.rows for i in ids}
    assert not renderer.explanation(group.rows[0][1]).end_tag_found


def test_full_log_probs_are_the_models_own() -> None:
    model = load("teacher_rl", "nano").model
    ids = [3, 9, 8, 7]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0] / 0.7
    expected = [float(logits[t].log_softmax(-1)[ids[t + 1]]) for t in range(3)]
    assert peers.full_log_probs(model, ids, 0.7).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_floors_by_hand(tied: bool) -> None:
    config = hf.LlamaConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=6, tie_word_embeddings=tied,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config)
    body = 3 * (2 * 64 + 2 * 32 + 3 * 48 + 2 * 8) + 8  # q and o, k and v, MLP, norms
    head = 80
    rows = [([1, 2, 3], [4, 5, 6]), ([1, 2, 3], [7, 8, 9])]
    # Two token steps each: 3 + 1 and 3 + 2 places, halves of a place's own pair left out.
    places = 2 * (3 * 2 + 2 * 2 / 2)
    assert prefill_floor(model, rows).flops == 2 * body * 3 + 4 * 3 * 8 * 9 / 2
    floor = decode_floor(model, rows)
    assert floor.flops == pytest.approx(2 * body * 4 + 2 * head * 4 + 4 * 3 * 8 * places)
    # Keys and values of 3 layers, 1 head of size 4; weights once a step; 4 bytes a number.
    assert floor.bytes_read == 4 * (2 * (body + head) + places * 2 * 3 * 4)
    forward = 2 * body * 9 + 2 * head * 6 + 4 * 3 * 8 * (9 / 2 + 2 * (9 + 9 / 2))
    assert update_floor(model, rows, needs_reference=True).flops == pytest.approx(4 * forward)


def test_a_phase_takes_as_long_as_the_slower_of_the_two() -> None:
    assert Floor(100.0, 30.0).seconds(10.0, 10.0) == 10.0
    assert Floor(100.0, 300.0).seconds(10.0, 10.0) == 30.0


def test_a_gpu_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="no CUDA device"):
        load("teacher_rl", "nano", ["hardware=gpu_80gb"])
    assert compose_stage("teacher_rl", "nano", ["hardware=gpu_80gb"]).hardware.accelerator == "gpu"
