"""One page on how rlt runs on this device: exactness of its fast paths, speed, memory; trl beside.

    make gpu-check                                     # on a GPU
    make gpu-check HARDWARE=gpu_8gb             # with the settings of another profile
    python -m benchmarks.gpu_check --models nano hardware=cpu --prompt-tokens 24 --new-tokens 8

Each model is trained with each adapter for two steps of teacher RL, every arm in a process of its
own. The second step's seconds, the peak memory of each phase and its estimate go into the page. trl
trains the first model with the same settings, where it is installed. Models are named as in
conf/model; a published size such as Qwen2.5-0.5B gets random weights, so that no hub is needed.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common import (
    Row,
    leave,
    parse,
    peer,
    peer_missing,
    plain_parser,
    process_options,
    publish,
    run_arm,
    run_from_command_line,
)
from benchmarks.machine import machine_facts
from benchmarks.memory import (
    FREE_AT_ONCE,
    GROUP_SIZE,
    GROUPS,
    PHASES,
    Setting,
    measure,
    peaks_in_gb,
)
from benchmarks.peers import grpo_steps
from benchmarks.update import unshared_prefixes
from benchmarks.what_fits import SIZES
from benchmarks.work import Work, compose_stage, device_for, load, random_groups
from rlt.config.build import build
from rlt.llm.logprobs import row_log_probs
from rlt.runs.files import write_text

ADAPTERS = ("none", "lora", "qlora")
PAGE = "gpu_check.md"
EXACTNESS = ("shared", "head", "sampled", "sampled_mean")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the check and return what it publishes; the page is written beside the JSON file.

    Args:
        argv: the command line; None means `sys.argv[1:]`.
    """
    made = plain_parser(__doc__)
    process_options(made)
    made.add_argument("--models", nargs="+", default=["smollm2_135m_packaged", "Qwen2.5-0.5B"])
    made.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=ADAPTERS)
    made.add_argument("--prompt-tokens", type=int, default=390)
    made.add_argument("--new-tokens", type=int, default=128)
    args = parse(made, argv)
    if args.arm:
        leave(args.arm_file, train(args))
        return {}
    cfg = compose_stage("teacher_rl", "nano", args.overrides)
    device = device_for(cfg)
    rows, exactness, failed = [], [], []
    for arm in arms_of(args.models, args.adapters):
        try:
            run = run_arm("gpu_check", args, arm, FREE_AT_ONCE)
        except RuntimeError as error:  # the others are worth a page
            failed.append({"arm": arm, "why": str(error).strip().splitlines()[-1]})
            continue
        if arm.startswith("trl"):
            rows.append({"arm": arm, **run["seconds"], "measured": run["peak_bytes"] / 1e9})
            continue
        rows.append({"arm": arm, **run["seconds"], "mfu": run["mfu"], **peaks_in_gb(run)})
        exactness.append({"arm": arm, **run["seen"]})
    result = publish(
        "gpu_check", args, machine_facts(device, getattr(torch, cfg.hardware.dtype)), rows,
        settings={
            "completions": GROUPS * GROUP_SIZE, "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens, "precision": str(cfg.hardware.precision),
        },
        exactness=exactness, failed=failed, peer=peer(),
    )  # fmt: skip
    page = args.output / PAGE
    write_text(page, page_of(result))
    print(f"{page} has the page")
    return result


def arms_of(models: Sequence[str], adapters: Sequence[str]) -> list[str]:
    """Names of the arms: who trains, the model, the adapter."""
    arms = [f"rlt {model} {adapter}" for model in models for adapter in adapters]
    if peer_missing() is None:
        named = [model for model in models if model not in SIZES][:1]
        arms += [f"trl {model} {adapter}" for model in named for adapter in adapters[:2]]
    return arms


def train(args: Any) -> dict[str, Any]:
    """Train as the arm's name says."""
    who, model, adapter = args.arm.split()
    if who == "rlt":
        setting = Setting(
            "teacher_rl", model, (f"adapter={adapter}",), args.prompt_tokens, args.new_tokens
        )
        return measure(setting, args.overrides, lambda work: exactness_of(work, args))
    options = [f"rollout.max_new_tokens={args.new_tokens}", f"adapter={adapter}"]
    work = load("teacher_rl", model, [*options, *args.overrides], prepared=False)
    steps = grpo_steps(work, GROUPS, GROUP_SIZE, args.prompt_tokens, args.new_tokens, 2)
    return {"seconds": steps[-1]}


def exactness_of(work: Work, args: Any) -> dict[str, float]:
    """How far log-probs of the fast paths are from those of every row by itself, in nats.

    Returns:
        `shared`: the largest difference where rows share the forward pass of their prompt;
        `head`: the largest difference between the chunked head and the model's own logits;
        `sampled`: the same of the log-probs that sampling gives, and `sampled_mean` their mean
        difference, absolute. The last two are larger where sampling computes in lower precision.
    """
    model, temperature = work.model.eval(), work.cfg.rollout.temperature
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero, so that an adapter that is merged wrongly would not be seen
            torch.nn.init.normal_(parameter, std=0.01)
    rollout = build(work.cfg.rollout)
    group = random_groups(work.renderer, GROUPS, 2, args.prompt_tokens, args.new_tokens)
    settings = {
        "temperature": temperature, "pad_id": work.tokenizer.pad_token_id, "token_budget": 2**14,
    }  # fmt: skip
    mixed = "mixed" in str(work.cfg.hardware.precision)
    autocast = torch.autocast(work.device.type, torch.bfloat16) if mixed else None
    with torch.no_grad(), autocast or contextlib.nullcontext():
        shared = torch.cat(row_log_probs(model, group.rows, **settings))
        with unshared_prefixes():
            alone = torch.cat(row_log_probs(model, group.rows, **settings))
        prompt, ids = group.rows[0]
        tokens_1T = torch.tensor([[*prompt, *ids]], device=work.device)
        logits_TV = model(input_ids=tokens_1T).logits[0, len(prompt) - 1 : -1].float() / temperature
        own_T = logits_TV.log_softmax(-1).gather(-1, tokens_1T[0, len(prompt) :, None])[:, 0]
        prompts = [work.renderer.teacher_prompt(problem) for problem in group.problems[::2]]
        groups = rollout.sample(model, work.tokenizer, prompts, 2, work.renderer.stop)
        sampled = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
        written = torch.cat(row_log_probs(model, [(p, c.ids) for p, c in sampled], **settings))
    told = torch.tensor([value for _, c in sampled for value in c.log_probs])
    gaps_N = (written.cpu() - told).abs()
    return {
        "shared": float((shared - alone).abs().max()),
        "head": float((own_T - alone[: len(ids)]).abs().max()),
        "sampled": float(gaps_N.max()),
        "sampled_mean": float(gaps_N.mean()),
    }


# --- the page -------------------------------------------------------------------------------------


def page_of(result: dict[str, Any]) -> str:
    """The result as a page of Markdown."""
    machine, settings = result["machine"], result["settings"]
    versions = ", ".join(f"{name} {n}" for name, n in machine["versions"].items() if n)
    where = machine["device"] if machine["device"] != "cpu" else machine["cpu"]
    phases = [*PHASES, "seconds"]
    speed = [
        [row["arm"], *(f"{row[phase]:.2f}" for phase in phases), _percent(row.get("mfu"))]
        for row in result["rows"]
    ]
    memory = [
        [row["arm"], *(_pair(row, f"{phase}_") for phase in PHASES), _pair(row, "")]
        for row in result["rows"]
    ]
    exact = [
        [row["arm"], *(f"{row[name]:.2g}" for name in EXACTNESS)] for row in result["exactness"]
    ]
    return "\n".join(
        [
            f"# rlt on {where}",
            "",
            f"`{result['command']}`, {machine['date'][:10]}. {settings['completions']} completions "
            f"of {settings['new_tokens']} tokens after prompts of {settings['prompt_tokens']}, "
            f"precision {settings['precision']}. {versions}. Matrix products reach "
            f"{machine['matmul_flops_per_second'] / 1e12:.2f} TFLOP/s. Peer: {result['peer']}.",
            "",
            "## Exactness of the fast paths",
            "",
            "Differences of log-probs from those of every row by itself, in nats. In float32 they "
            "are at most 1e-3. In bfloat16 a log-prob is rounded by up to a few hundredths.",
            "",
            *_table(["arm", "shared prompts", "chunked head", "sampled", "sampled, mean"], exact),
            "",
            "## Seconds of one step",
            "",
            "On a CPU, freed memory goes back to the system at once here, so that phases have "
            "peaks of their own. That makes a step up to half as long again.",
            "",
            *_table(["arm", *PHASES, "step", "share of the matrix-product rate (update)"], speed),
            "",
            "## Peak memory in GB: measured (estimated)",
            "",
            "Peaks of rlt are those within each phase. The peak of trl is that of its whole "
            "process, with loading.",
            "",
            *_table(["arm", *PHASES, "all"], memory),
            "",
            *(f"{row['arm']} failed: {row['why']}" for row in result["failed"]),
        ]
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _pair(row: Row, prefix: str) -> str:
    """Measured and estimated peak of one phase, or of all; trl has no estimate, and no phases."""
    measured, estimated = row.get(f"{prefix}measured"), row.get(f"{prefix}estimated")
    if measured is None:
        return ""
    return f"{measured:.2f}" if estimated is None else f"{measured:.2f} ({estimated:.2f})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return [*head, *("| " + " | ".join(row) + " |" for row in rows)]


if __name__ == "__main__":
    run_from_command_line(main)
