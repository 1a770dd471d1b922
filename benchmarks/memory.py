"""The plan's memory estimate against measured peaks, phase by phase, on a CPU.

Every setting runs in a process of its own. It composes the stage, estimates the peaks as
`check=true` does, loads the models and makes two training steps on rows of exact lengths. Peaks are
those of the process' resident memory, set back at the beginning of each phase. Blocks that are
freed go back to the system at once here, so that one phase does not hide the next.

    python -m benchmarks.memory
    python -m benchmarks.memory --only "SmolLM2, RL"
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import (
    Row,
    leave,
    parse,
    plain_parser,
    process_options,
    publish,
    run_arm,
    run_from_command_line,
)
from benchmarks.machine import machine_facts
from benchmarks.what_fits import SIZES, Sized
from benchmarks.work import (
    StepClock,
    Work,
    compose_stage,
    device_for,
    endless,
    fit,
    load,
    problems_of,
    random_ids,
    sft,
    teacher_rl,
)
from rlt.config.build import build_stage
from rlt.preflight.memory_estimate import CUDA_BYTES, peak_bytes, shape_of
from rlt.training import Example

SMOL = "smollm2_135m_packaged"
HALF = "Qwen2.5-0.5B"


@dataclass(frozen=True)
class Setting:
    """A training stage on rows of one length.

    Attributes:
        stage: `teacher_rl` or `teacher_sft`.
        model: a file of conf/model, or a published size of `benchmarks.what_fits`, whose weights
            are then random.
        overrides: of the config.
        prompt: tokens of a prompt.
        target: tokens of a completion, or of an example's target.
    """

    stage: str
    model: str = SMOL
    overrides: tuple[str, ...] = ()
    prompt: int = 390
    target: int = 128


SETTINGS = {
    "nano, RL, full": Setting("teacher_rl", "nano", prompt=24, target=32),
    "nano, SFT, full": Setting("teacher_sft", "nano", prompt=24, target=32),
    "SmolLM2, RL, full": Setting("teacher_rl"),
    "SmolLM2, RL, full, checkpointing": Setting(
        "teacher_rl", overrides=("hardware.gradient_checkpointing=true",)
    ),
    "SmolLM2, RL, full, 4096 tokens": Setting(
        "teacher_rl", overrides=("hardware.tokens_per_micro_batch=4096",)
    ),
    "SmolLM2, RL, LoRA": Setting("teacher_rl", overrides=("adapter=lora",)),
    "SmolLM2, RL, LoRA, bf16-mixed": Setting(
        "teacher_rl", overrides=("adapter=lora", "hardware.precision=bf16-mixed")
    ),
    "SmolLM2, RL, QLoRA": Setting("teacher_rl", overrides=("adapter=qlora",)),
    "SmolLM2, SFT, full": Setting("teacher_sft", target=256),
    "SmolLM2, SFT, LoRA": Setting("teacher_sft", overrides=("adapter=lora",), target=256),
    "0.5 B, RL, LoRA": Setting("teacher_rl", HALF, ("adapter=lora",)),
    "0.5 B, RL, QLoRA": Setting("teacher_rl", HALF, ("adapter=qlora",)),
    "0.5 B, SFT, LoRA, checkpointing": Setting(
        "teacher_sft", HALF, ("adapter=lora", "hardware.gradient_checkpointing=true"), target=256
    ),
    "0.5 B, SFT, full": Setting("teacher_sft", HALF, target=256),
}
GROUPS, GROUP_SIZE, ROWS = 2, 4, 8
PHASES = ("rollout", "reward", "update")
# Blocks above 128 KiB are given back when they are freed, so that one phase does not hide the next.
FREE_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return what it publishes, as its JSON file holds it.

    Args:
        argv: the command line; None means `sys.argv[1:]`.
    """
    made = plain_parser(__doc__)
    process_options(made)
    made.add_argument("--only", default="", help="settings whose label begins with this")
    args = parse(made, argv)
    if args.arm:
        leave(args.arm_file, measure(SETTINGS[args.arm], args.overrides))
        return {}
    rows: list[Row] = []
    for label in (name for name in SETTINGS if name.startswith(args.only)):
        run = run_arm("memory", args, label, FREE_AT_ONCE)
        rows.append({"arm": label, **peaks_in_gb(run)})
        print(json.dumps(rows[-1]), flush=True)
    cfg = compose_stage("teacher_rl", "nano", args.overrides)
    return publish(
        "memory", args, machine_facts(device_for(cfg), torch.float32), rows,
        settings={"completions": GROUPS * GROUP_SIZE, "rows": ROWS},
        ratios={
            f"estimate of {row['arm']}": row["estimated"] / row["measured"] for row in rows
        },
    )  # fmt: skip


def measure(
    setting: Setting, overrides: Sequence[str], look: Callable[[Work], Any] | None = None
) -> dict[str, Any]:
    """Train for two steps; peaks in bytes by phase and the seconds of the second step.

    Args:
        setting: what is trained.
        overrides: of the config, after the setting's own.
        look: is given the loaded model before it is trained; its result is returned.
    """
    with tempfile.TemporaryDirectory() as folder:
        name, source = setting.model, []
        if setting.model in SIZES:
            save_random(setting.model, Path(folder))
            name, source = "pretrained", [f"teacher.path={folder}"]
        options = [*source, *setting.overrides]
        if setting.stage == "teacher_rl":
            options += [f"datamodule.batch_size={GROUPS}", f"module.group_size={GROUP_SIZE}"]
            options += [f"rollout.max_new_tokens={setting.target}"]
        else:
            options += [f"datamodule.batch_size={ROWS}"]
        options += overrides
        stage = build_stage(compose_stage(setting.stage, name, options))
        shape = shape_of(stage.source("teacher"), stage.adapter)
        shapes = dict.fromkeys(stage.roles, shape)
        longest = setting.prompt + setting.target
        estimated = peak_bytes(stage, shapes, longest, setting.prompt)
        work, clock = load(setting.stage, name, options), StepClock()
        seen = look(work) if look is not None else None
        measured = dict.fromkeys(estimated, 0)
        if setting.stage == "teacher_rl":
            module: Any = teacher_rl(work, 2)
            for phase, method in zip(PHASES, ("sample", "score", "update"), strict=True):
                watch(module, method, phase, measured)
            with endless(work.tokenizer):
                fit(work, module, problems_of(work.renderer, GROUPS, setting.prompt), 2, [clock])
        else:
            module = sft(work, 2)
            watch(module, "training_step", "update", measured)
            examples = [
                Example(ids[: setting.prompt], ids[setting.prompt :], f"row {n}")
                for n, ids in enumerate(random_ids(work.tokenizer, ROWS, longest))
            ]
            fit(work, module, examples, 2, [clock])
        metrics = module.trainer.callback_metrics
    return {
        "estimated": estimated,
        "measured": measured,
        "seconds": clock.steps[-1],
        "mfu": float(metrics["time/train_mfu"]),
        "seen": seen,
    }


def peaks_in_gb(run: Mapping[str, Any]) -> dict[str, float]:
    """Columns of a table: estimated and measured peaks of a `measure`, by phase and of all."""
    columns = {}
    for kind in ("estimated", "measured"):
        columns[kind] = max(run[kind].values()) / 1e9
        columns |= {f"{phase}_{kind}": size / 1e9 for phase, size in run[kind].items()}
    return columns


def save_random(size: str, folder: Path) -> None:
    """Save a model of one of the published sizes with random weights, and SmolLM2's tokenizer."""
    config = Sized(size, "float32").configuration()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    stage = build_stage(compose_stage("teacher_rl", SMOL, []))
    stage.source("teacher").tokenizer().save_pretrained(folder)


def watch(module: Any, method: str, phase: str, measured: dict[str, int]) -> None:
    """Note the largest memory that is held within a method of a module."""
    inner: Callable[..., Any] = getattr(module, method)

    def watched(*args: Any, **kwargs: Any) -> Any:
        forget_peak(module.device)
        try:
            return inner(*args, **kwargs)
        finally:
            measured[phase] = max(measured[phase], peak_since(module.device))

    setattr(module, method, watched)


def forget_peak(device: torch.device) -> None:
    """Have the peak begin anew at what is held now, of the GPU or of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_since(device: torch.device) -> int:
    """The most bytes held since `forget_peak`; on a GPU with those of CUDA's own context."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() + CUDA_BYTES
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    run_from_command_line(main)
