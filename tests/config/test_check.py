"""Every unknown key and missing value of a config is found, and all are named together."""

import pytest

from rlt.config.check import check_targets
from tests.config.nodes import ALGORITHM, config


def test_a_correct_config_has_no_errors_though_arguments_are_absent() -> None:
    cfg = config(
        {
            "algorithm": {"_target_": ALGORITHM, "beta": 0.1, "_convert_": "all"},
            "optim": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3},
            "schedule": {"_target_": "transformers.get_scheduler", "_partial_": True},
            "trainer": {"_target_": "lightning.pytorch.Trainer", "max_steps": 3},
            "callbacks": {
                "a": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint"},
                "b": None,
            },
            "plain": {"anything": [1, {"at": "all"}], "null": None},
        }
    )
    assert check_targets(cfg) == []


def test_typos_are_found_beside_a_target_nested_and_in_lists_all_at_once() -> None:
    cfg = config(
        {
            "algorithm": {"_target_": ALGORITHM, "epsilon_hi": 0.2},
            "a": {"b": {"_target_": "torch.optim.AdamW", "weight_decai": 0.1}},
            "t": {
                "_target_": "lightning.pytorch.Trainer",
                "callbacks": [
                    {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "x"},
                    {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitr": "x"},
                ],
            },
        }
    )
    errors = check_targets(cfg)
    assert len(errors) == 3
    assert errors[0].startswith(
        f"algorithm.epsilon_hi: {ALGORITHM} has no parameter 'epsilon_hi'; did you mean "
        "'epsilon_high'"
    )
    assert "accepted: aggregation, objective, ratio, epsilon_low, epsilon_high" in errors[0]
    assert errors[1].startswith("a.b.weight_decai: torch.optim.AdamW has no parameter")
    assert "did you mean 'weight_decay'" in errors[1]
    assert errors[2].startswith("t.callbacks[1].monitr: ")
    assert "did you mean 'monitor'" in errors[2]


def test_a_name_that_resembles_nothing_gets_the_list_alone() -> None:
    (error,) = check_targets(config({"a": {"_target_": ALGORITHM, "zzz": 1}}))
    assert "did you mean" not in error and "accepted: aggregation" in error


def test_any_key_is_accepted_only_where_the_signature_takes_any() -> None:
    logger = "lightning.pytorch.loggers.TensorBoardLogger"  # has **kwargs
    assert check_targets(config({"a": {"_target_": logger, "flush_secs": 1}})) == []
    assert check_targets(config({"a": {"_target_": ALGORITHM, "flush_secs": 1}})) != []
    (error,) = check_targets(config({"a": {"_target_": logger, "nam": 1}}))
    assert "did you mean 'name'" in error  # the logger would pass it on to its writer
    assert check_targets(config({"a": {"_target_": logger, "log_dir_suffix": 1}})) == []
    grader = "rlt.evaluation.graders.ExactGrader"  # a protocol's signature takes any
    (error,) = check_targets(config({"a": {"_target_": grader, "foo": 1}}))
    assert error.startswith("a.foo: ")


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("datamodule", "seed"),
        ("logger", "save_dir"),
        ("teacher_rl.module", "gradient_checkpointing"),
        ("trainer", "default_root_dir"),
    ],
)
def test_what_the_program_sets_itself_is_no_key(part: str, key: str) -> None:
    targets = {
        "datamodule": "rlt.data.batches.StepDataModule",
        "logger": "lightning.pytorch.loggers.TensorBoardLogger",
        "teacher_rl.module": "rlt.training.rl.RL",
        "trainer": "lightning.pytorch.Trainer",
    }
    path, _, name = part.rpartition(".")
    stage = {"_target_": "rlt.stages.teacher_rl.TeacherRL"}
    stage |= {name: {"_target_": targets[part], key: 1}}
    errors = check_targets(config({path: stage} if path else stage))
    assert f"{part}.{key}: the program sets it itself; leave it out" in errors


def test_a_part_without_a_value_is_told_beside_the_others() -> None:
    errors = check_targets(config({"callbacks": {"x": "???", "y": {"every": 1}}}))
    assert {error.partition(":")[0] for error in errors} == {"callbacks.x", "callbacks.y"}


@pytest.mark.parametrize("key", ["_partail_", "_convret_"])
def test_misspelt_hydra_keys(key: str) -> None:
    (error,) = check_targets(
        config({"a": {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", key: True}})
    )
    assert error.startswith(f"a.{key}: no such Hydra key; did you mean '_")


def test_misspelt_target_key() -> None:
    (error,) = check_targets(config({"a": {"_traget_": "os.system", "command": "ls"}}))
    assert error == "a._traget_: no such Hydra key; did you mean '_target_'?"


def test_a_target_that_a_reference_carries_is_checked_once_under_its_own_path() -> None:
    cfg = config({"a": {"copy": "${z}"}, "z": {"_target_": ALGORITHM, "bteta": 1}})
    (error,) = check_targets(cfg)
    assert error.startswith("z.bteta: ")


@pytest.mark.parametrize("text", ["oc.create:'{_target_: os.system}'", "oc.decode:'{x: 1}'"])
def test_a_mapping_that_a_resolver_makes_is_refused(text: str) -> None:
    """It is made anew whenever it is looked at, out of an environment that may have changed."""
    errors = check_targets(config({"a": [{"b": f"${{{text}}}"}]}))
    assert errors[0].startswith(f"a[0].b=${{{text}}}: a resolver may give a plain value")
    assert check_targets(config({"a": "${oc.decode:'3'}", "b": "${a}"})) == []


@pytest.mark.parametrize("text", ["${${x}:'{a: 1}'}", "${a.b:${oc.${x}:3}}", "${oc.${x}:'3'}"])
def test_a_resolver_whose_name_is_computed_is_refused(text: str) -> None:
    errors = check_targets(config({"x": "decode", "a": [text]}))
    assert f"a[0]={text}: the name of a resolver must be written out" in errors


def test_a_reference_whose_name_is_computed_passes() -> None:
    cfg = config({"x": "y", "z": {"y": {"v": 3}}, "a": "${z.${x}}", "b": "${oc.env:NO,${x}:${x}}"})
    assert check_targets(cfg) == []


def test_text_that_would_be_resolved_once_more_is_refused() -> None:
    text = "\\${oc.create:{_target_: os.system, command: ls}}"
    (error,) = check_targets(config({"a": text}))
    assert error == f"a={text}: must not give another interpolation"


def test_a_target_is_written_out() -> None:
    (error,) = check_targets(config({"x": ALGORITHM, "a": {"_target_": "${x}"}}))
    assert error == "a._target_: must be written out, not be an interpolation"


def test_references_in_a_circle_end() -> None:
    cfg = config({"a": {"b": "${c}"}, "c": {"d": "${a}"}})
    assert check_targets(cfg) == []


def test_missing_values_are_named_wherever_they_are() -> None:
    cfg = config(
        {
            "path": "???",
            "a": {"_target_": ALGORITHM, "beta": "???", "typo": 1},
            "list": [1, "???"],
            "b": {"_target_": "???"},
        }
    )
    errors = check_targets(cfg)
    names = [error.partition(":")[0] for error in errors]
    assert names == ["path", "a.typo", "a.beta", "list[1]", "b._target_"]
    assert errors[0] == "path: has no value (???); set it, e.g. path=… on the command line"


def test_only_the_given_part_is_checked_for_missing_values() -> None:
    cfg = config({"used": {"x": "${other.y}"}, "other": {"y": 1, "z": "???"}})
    assert check_targets(cfg.used) == []


def test_an_interpolation_that_leads_nowhere_is_named() -> None:
    (error,) = check_targets(config({"a": {"b": "${nowhere}"}}))
    assert error.startswith("a.b: cannot be resolved: Interpolation key 'nowhere' not found")


def test_keys_that_neither_every_run_nor_its_stage_has() -> None:
    compare = {"_target_": "rlt.stages.compare.Compare", "stage": "compare", "note": None}
    (error,) = check_targets(config(compare | {"seed": 1, "sed": 2}))
    assert error.startswith("sed: no such key; did you mean 'seed'?; valid: accept_changes, ")


def test_a_config_without_a_stage() -> None:
    (error,) = check_targets(config({"stage": "compare"}))
    assert error == (
        "this config names no stage: its key _target_ is missing. Choose one by stage=…"
    )
