"""README.md of an exported model: what it is, how it was made, how to use it."""

from collections.abc import Mapping
from pathlib import Path

from rlt.llm.adapter_layers import read_adapter_config
from rlt.report.folder import Run
from rlt.report.results import result_lines
from rlt.report.run import provenance
from rlt.report.text import fenced, heading, inline_code
from rlt.runs.formatting import number

CARD = "README.md"


def write_model_card(run_dir: Path) -> Path | None:
    """Write model/README.md of a finished run and return its path; None if there is no model."""
    run, folder = Run(run_dir), run_dir / "model"
    if not folder.is_dir():
        return None
    source = _base_model(run)
    adapter = read_adapter_config(folder)
    library = "transformers" if adapter is None else "peft"
    front = [f"library_name: {library}", "pipeline_tag: text-generation"]
    front += ["tags:", "- rlt", f"- {run.stage}"]
    if source and source.count("/") == 1 and not source.startswith((".", "/")):
        front.append(f"base_model: {source}")
    parameters = (run.manifest.get("models") or {}).get("parameters")
    metadata = [f"- {line}" for line in result_lines(run)]
    if parameters:
        metadata.insert(0, f"- {number(parameters)} parameters.")
    if adapter is not None:
        metadata.insert(
            0,
            f"- A LoRA adapter of rank {adapter['r']}; its base model is "
            f"{inline_code(str(adapter['base_model_name_or_path']))}, which has to be at hand.",
        )
    tags = _tags(run.manifest.get("tags") or {})
    made = provenance({k: v for k, v in run.manifest.items() if k != "hardware"})
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {heading(run.stage)} · rlt",
        _first_sentence(run),
        "\n".join(metadata),
        heading(run.note),
        "## Use\n\n" + fenced(_USE),
        tags,
        "## Limits\n\nTrained and measured on the data named below alone; nothing was done for "
        "safety, and nothing is known of other tasks or languages.",
        f"Data: {heading(str((run.manifest.get('data') or {}).get('source', 'not recorded')))}",
        f"## How it was made\n\n{made}",
    ]
    file = folder / CARD
    file.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return file


def _first_sentence(run: Run) -> str:
    stage = run.stage_class
    return getattr(stage, "card", None) or "A model made by rlt."


_USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/model")
model = AutoModelForCausalLM.from_pretrained("path/to/model")"""


def _base_model(run: Run) -> str | None:
    role = getattr(run.stage_class, "trains", None) or "student"
    node = run.config.get(role)
    return str(node["path"]) if isinstance(node, dict) and node.get("path") else None


def _tags(tags: Mapping[str, str]) -> str:
    """Return one sentence on the tags by which the prompts mark thoughts and answers."""
    told = "; ".join(
        f"{name} {inline_code(tags[f'{name}_open'])} … {inline_code(tags[f'{name}_close'])}"
        for name in ("thought", "solution", "explanation")
        if f"{name}_open" in tags
    )
    whole = "`config.yaml` of the run holds the whole style."
    return f"Tags of its prompts: {told}. {whole}" if told else ""
