"""An exported student under lm-eval, on a local task: the same answers as `stage=evaluate` gives.

Needs the extra `eval` (pip install '.[eval]'), which the lock leaves out.
"""

import json
from pathlib import Path

import pytest

from tests.cli import read_lines, results, rlt, stage

TASK = """\
task: rlt_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{solution}}}}"
generation_kwargs: {{until: ["</answer>"], max_gen_toks: 20, do_sample: false}}
filter_list:
  - name: answer
    filter: [{{function: regex, regex_pattern: "<answer>\\\\s*(\\\\S+)"}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
def test_the_same_answers_under_lm_eval(chain: Path, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="pip install '.[eval]'")
    greedy = ["rollout.temperature=0", "samples=1", "output_dir=greedy"]
    rlt([*stage("evaluate", "student_path=pretrain/model"), *greedy], chain)
    records = read_lines(chain / "greedy" / "answers.jsonl")
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "task.yaml").write_text(TASK.format(file=file))
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(chain / "pretrain" / "model"), "dtype": "float32",
            "add_bos_token": False,  # the prompt holds it already
        },
        tasks=["rlt_answers"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path)),
        device="cpu", batch_size=1, log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    score = found["results"]["rlt_answers"]["exact_match,answer"]
    assert score == pytest.approx(results(chain / "greedy")["eval/avg@1"])
    samples = sorted(found["samples"]["rlt_answers"], key=lambda sample: sample["doc_id"])
    for record, sample in zip(records, samples, strict=True):
        ours = record["text"].partition("</answer>")[0].replace("<eos>", "").split()
        assert sample["resps"][0][0].split() == ours
