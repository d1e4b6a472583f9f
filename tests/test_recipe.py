"""Recipes: every shipped one resolves to the numbers it claims, and every fault is named in one line."""

import json
import re
from pathlib import Path

import pytest
import yaml

from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.derived import check_evaluations, derive, remarks
from llava_llama31.trainer.recipes.loading import SHIPPED, load_recipe
from llava_llama31.trainer.recipes.schema import Recipe


PROJECTOR, LANGUAGE, TOWER = "multi_modal_projector", "language_model", "vision_tower"


def held_out(rows, fraction=0.01):
    return rows - int(rows * fraction)


# rows before the 1 % that is held out, devices, global batch, accumulation, steps, groups, learning rate
CARD = {
    "projector": (3000, 1, 16, 16, 185, {PROJECTOR}, 1e-5),
    "pretrain": (270_000, 8, 256, 16, 1044, {PROJECTOR, LANGUAGE}, 2e-5),
    "instruct": (157_712, 8, 256, 16, 1218, {PROJECTOR, LANGUAGE}, 1e-5),
}
COMMANDS = {
    "projector": (3000, 1, 16, 16, 185, {PROJECTOR}, 1e-5),
    "pretrain": (558_128, 8, 256, 16, 2158, {TOWER, PROJECTOR, LANGUAGE}, 2e-5),
    "instruct": (624_610, 8, 256, 16, 4830, {TOWER, PROJECTOR, LANGUAGE}, 1e-5),
}


@pytest.mark.parametrize(("name", "expected"), [("llama31-8b-card", CARD), ("llama31-8b-card-commands", COMMANDS)])
def test_the_cards_recipes_have_the_cards_numbers(name, expected):
    recipe = load_recipe(name)
    assert recipe.seed == 42 and list(recipe.stages) == list(expected)
    for stage_name, (rows, devices, batch, accumulation, steps, groups, rate) in expected.items():
        stage = recipe.stages[stage_name]
        derived = derive(stage, held_out(rows), devices)
        assert (stage.global_batch, derived.gradient_accumulation, derived.steps) == (batch, accumulation, steps)
        assert set(stage.trainable) == groups and set(stage.learning_rates().values()) == {rate}
        assert (stage.weight_decay, stage.adam_beta1, stage.adam_beta2) == (0.1, 0.9, 0.95)
        assert (stage.adam_epsilon, stage.max_grad_norm, stage.warmup_ratio) == (1e-8, 1.0, 0.03)
        assert stage.activation_checkpointing and stage.precision.startswith("bfloat16")
        assert (stage.max_text_tokens, stage.max_tokens, stage.validation_fraction) == (2048, None, 0.01)
        assert (stage.eval_steps, stage.save_steps, stage.save_total_limit) == (200, 200, 2)
        assert stage.init_from == "previous" and stage.schedule == "cosine"
    projector = recipe.stages["projector"].data[0]
    assert (projector.sample, projector.sample_when) == (3000, "before_filtering")
    assert [stage.epochs for stage in recipe.stages.values()] == [1, 1, 2]


def test_the_cards_quirks_are_in_the_commands_alone():
    prose, commands = load_recipe("llama31-8b-card"), load_recipe("llama31-8b-card-commands")
    assert all(not stage.quirks for stage in prose.stages.values())
    assert commands.stages["projector"].quirks == ["frozen_image_newline", "double_newline_after_image"]
    for name, device in (("pretrain", None), ("instruct", {"device": "cpu", "pin_memory": True})):
        stage = commands.stages[name]
        assert stage.quirks == ["double_newline_after_image", "decay_all_parameters"]
        from llava_llama31.trainer.recipes.deepspeed_files import deepspeed_file

        config = json.loads(deepspeed_file(stage.deepspeed, name).read_text())
        assert config["scheduler"]["type"] == "WarmupCosineLR"
        assert config["zero_optimization"]["stage"] == 3
        assert config["zero_optimization"].get("offload_param") == device
        assert "offload_optimizer" not in config["zero_optimization"]
    assert commands.stages["instruct"].data[0].images_only


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_resolves(name):
    recipe = load_recipe(name, output=Path("somewhere"))
    assert recipe.name == name and recipe.stages
    for stage in recipe.stages.values():
        derived = derive(stage, 100_000, 1)
        assert derived.gradient_accumulation * stage.micro_batch == stage.global_batch
        assert derived.steps > 0
    assert "{output}" not in recipe.model_dump_json()


def test_shipped_lists_every_recipe_file():
    import llava_llama31.trainer.recipes as package

    files = {path.stem for path in Path(package.__file__).parent.glob("*.yaml")}
    assert files == set(SHIPPED)


STAGE = {
    "trainable": [PROJECTOR],
    "learning_rate": 1e-3,
    "data": [{"name": "a", "path": "a.json"}],
    "global_batch": 8,
    "epochs": 1,
}


def write(tmp_path, stage=None, **recipe):
    content = {
        "name": "mine",
        "model": {"checkpoint": "base"},
        "stages": {"one": {**STAGE, **(stage or {})}},
        **recipe,
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


FAULTS = [
    (
        {"stage": {"learning_rat": 1e-3}},
        r"mine\.yaml: stages\.one\.learning_rat: unknown key .*did you mean learning_rate\?",
    ),
    ({"stage": {"learning_rate": "fast"}}, r"mine\.yaml: stages\.one\.learning_rate: .*not 'fast'"),
    ({"stage": {"epochs": "three"}}, r"stages\.one\.epochs: .*not 'three'"),
    (
        {"stage": {"global_batch": 8, "micro_batch": 3}},
        r"stages\.one: global_batch 8 is not a multiple of micro_batch 3",
    ),
    ({"stage": {"trainable": ["projector"]}}, r"stages\.one\.trainable\.0: .*multi_modal_projector.*not 'projector'"),
    ({"stage": {"max_steps": 3}}, r"stages\.one: .*give exactly one of epochs and max_steps"),
    ({"stage": {"learning_rate": {LANGUAGE: 1e-3}}}, r"learning_rate names .*language_model.* but trainable names"),
    ({"stage": {"data": [{"name": "a", "paht": "a.json"}]}}, r"stages\.one\.data\.0\.(path|paht): "),
    ({"stage": {"eval_steps": 5}}, r"eval_steps has nothing .*validation_fraction"),
    ({"stage": {"lora": {}}}, r"lora adapts the language_model, which is frozen"),
    (
        {"stage": {"trainable": [LANGUAGE], "lora": {"targets": ["v_proj", "q_prj"]}}},
        r"stages\.one\.lora\.targets\.1: .*not 'q_prj' \(fix: did you mean q_proj\?",
    ),
    (
        {"stage": {"trainable": [LANGUAGE], "lora": {"targets": ["lm_head"]}}},
        r"stages\.one\.lora\.targets\.0: .*not 'lm_head'",
    ),
    ({"modle": {}}, r"mine\.yaml: modle: unknown key.*did you mean model\?"),
    ({"model": {"vision_tower": "x"}}, r"model: .*give either checkpoint, or both"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_every_fault_is_one_line_with_file_key_and_fix(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(write(tmp_path, **change))
    assert "\n" not in str(caught.value)


NUMBERS = [
    *("learning_rate", "weight_decay", "epochs", "adam_epsilon", "max_grad_norm", "feature_cache_gb", "step_timeout"),
    *("loader_timeout", "adam_beta1", "adam_beta2", "warmup_ratio", "validation_fraction", "lora.alpha"),
    *("lora.dropout", "trainer_args.label_smoothing_factor", "data.0.weight"),
]


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
@pytest.mark.parametrize("key", [*(f"stages.one.{key}" for key in NUMBERS), "device_watts"])
def test_a_number_that_is_not_finite_is_refused_by_its_key(tmp_path, key, value):
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path), overrides=[f"{key}={value}"])
    said = str(caught.value)
    assert caught.value.exit_code == 2 and said.count("(fix: ") == 1 and "\n" not in said
    assert key in said or all(part in said for part in key.rsplit(".", 1))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((f"stages.one.{key}", "1e300") for key in ("learning_rate", "epochs", "step_timeout", "lora.alpha")),
        *(
            (f"stages.one.{key}", str(10**30))
            for key in ("micro_batch", "max_tokens", "trainer_args.ddp_bucket_cap_mb")
        ),
        ("stages.one.data.0.weight", "1e300"),
        ("stages.one.data.0.sample", str(10**30)),
        ("stages.one.loader_timeout", "1e10"),  # more seconds than the system can wait
        ("stages.one.dataloader_workers", "100000"),
        ("seed", str(2**32)),  # NumPy takes no more
    ],
)
def test_a_number_that_is_too_large_is_refused_by_its_key(tmp_path, key, value):
    with pytest.raises(UserError, match=r"out of range \(fix: give \d+ at most\)") as caught:
        load_recipe(write(tmp_path), overrides=[f"{key}={value}"])
    said = str(caught.value)
    assert all(part in said for part in key.rsplit(".", 1)) and "\n" not in said


@pytest.mark.parametrize("key", ["stages.one.data.0.path", "stages.one.data.0.image_root", "model.checkpoint"])
def test_an_empty_name_is_not_the_working_directory(tmp_path, key):
    with pytest.raises(UserError, match=f"{re.escape(key)}: is empty .fix: name one, or remove the key"):
        load_recipe(write(tmp_path), overrides=[f"{key}=''"])


def test_rates_by_group_and_nested_arguments_are_finite_too(tmp_path):
    with pytest.raises(UserError, match=r"stages\.one\.learning_rate.*finite number"):
        load_recipe(write(tmp_path, stage={"learning_rate": {PROJECTOR: float("inf")}}))
    with pytest.raises(UserError, match=r"stages\.one\.trainer_args: optim_args\.1\.x is inf \(fix: give a finite"):
        load_recipe(write(tmp_path, stage={"trainer_args": {"optim_args": [1, {"x": float("inf")}]}}))


def test_yaml_numbers_in_scientific_notation_are_numbers(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(Path(write(tmp_path)).read_text().replace("0.001", "1e-3"))
    assert load_recipe(str(path)).stages["one"].learning_rate == 1e-3


def test_a_key_given_twice_and_broken_yaml_are_named_with_their_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(UserError, match=r"r\.yaml:2:1: .*'name' is given twice"):
        load_recipe(str(path))
    path.write_text("name: [a\n")
    with pytest.raises(UserError, match=r"r\.yaml:\d+:\d+: not valid YAML"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed: " + "9" * 5000, r"mine\.yaml:\d+:7: not valid YAML: Exceeds the limit"),
        ("seed: 2026-13-45", r"mine\.yaml:\d+:7: not valid YAML: month must be in 1\.\.12"),
        ("name: &a [*a]", "nested too deeply, or an anchor contains itself"),
        ("name: " + "[" * 3000, "not valid YAML: nested too deeply"),
    ],
)
def test_values_that_python_cannot_hold_are_one_line(tmp_path, line, message):
    path = Path(write(tmp_path))
    path.write_text("".join(f"{kept}\n" for kept in path.read_text().splitlines() if kept[:4] != line[:4]) + line)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)
    if line.startswith("seed"):
        with pytest.raises(UserError, match="--set seed: .* is not YAML: "):
            load_recipe(write(tmp_path), overrides=[line.replace(": ", "=")])


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean tiny"):
        load_recipe("tinny")


def test_overrides_reach_every_level(tmp_path):
    recipe = load_recipe(
        write(tmp_path), overrides=["stages.one.learning_rate=2e-5", "stages.one.data.0.sample=7", "seed=3"]
    )
    assert recipe.stages["one"].learning_rate == 2e-5
    assert recipe.stages["one"].data[0].sample == 7 and recipe.seed == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.two.epochs=1", "there is no stage 'two'"),
        ("stages.one.epoch=1", "unknown key"),
        ("seed", "not KEY=VALUE"),
        ("stages.one.data.4.sample=1", "not a position in a list of 1"),
    ],
)
def test_overrides_that_fit_nothing_are_refused(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path), overrides=[override])


def test_a_batch_that_does_not_divide_among_devices_is_refused(tmp_path):
    stage = load_recipe(write(tmp_path)).stages["one"]
    with pytest.raises(UserError, match="not a multiple of micro_batch 1 x 3 devices"):
        derive(stage, 100, 3)


def test_the_last_batch_is_kept_or_dropped_by_name(tmp_path):
    keep = load_recipe(write(tmp_path)).stages["one"]
    drop = load_recipe(write(tmp_path, stage={"last_batch": "drop"})).stages["one"]
    assert (derive(keep, 17, 1).steps, derive(drop, 17, 1).steps) == (3, 2)
    with pytest.raises(UserError, match="7 samples do not fill one batch of 8"):
        derive(drop, 7, 1)


def test_no_sample_to_train_on_is_reported_as_such(tmp_path):
    stage = load_recipe(write(tmp_path)).stages["one"]
    with pytest.raises(UserError) as refused:
        derive(stage, 0, 1)
    assert str(refused.value) == "there is no sample to train on (fix: add data)"
    with pytest.raises(UserError, match="no sample .* but those held out .fix: .* lower validation_fraction"):
        derive(stage.model_copy(update={"validation_fraction": 0.5}), 0, 1)


def test_a_batch_larger_than_the_data_is_remarked(tmp_path):
    stage = load_recipe(write(tmp_path)).stages["one"]
    assert stage.global_batch == 8 and remarks(stage, derive(stage, 8, 1)) == []
    (remark,) = remarks(stage, derive(stage, 5, 1))
    assert remark.startswith("a step has 5 samples, not 8")


def test_evaluations_beyond_the_last_step_are_remarked_or_refused(tmp_path):
    changes = {"eval_steps": 4, "save_steps": 2, "validation_fraction": 0.1}
    stage = load_recipe(write(tmp_path, stage=changes)).stages["one"]
    assert remarks(stage, derive(stage, 32, 1)) == []
    (remark,) = remarks(stage, derive(stage, 24, 1))
    assert remark == "no evaluation before the end: eval_steps is 4, the last step is 3"
    check_evaluations(stage, 3, where="stages.one")
    best = stage.model_copy(update={"keep": "best_loss"})
    check_evaluations(best, 4, where="stages.one")
    with pytest.raises(UserError) as refused:
        check_evaluations(best, 3, where="stages.one")
    assert str(refused.value) == (
        "stages.one: keep: best_loss has nothing to choose from: the first evaluation is at step 4, the last step is "
        "3 (fix: set eval_steps to 3 or less, or keep: last)"
    )


@pytest.mark.parametrize(("key", "former"), [("license", "licence"), ("vision_tower_license", "vision_tower_licence")])
def test_former_keys_still_read(recipe_content, tmp_path, key, former):
    recipe_content["model"][former] = "mit"
    recipe_content["stages"]["projector"]["data"][0]["licence"] = "CC0"
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_content))
    recipe = load_recipe(str(file))
    assert recipe.stages["projector"].data[0].license == "CC0"
    assert recipe.model.model_dump()[key] == "mit" and former not in recipe.model.model_dump()
    for name in (key, former):
        changed = load_recipe(str(file), overrides=[f"model.{name}=apache-2.0"])
        assert changed.model.model_dump()[key] == "apache-2.0"
    recipe_content["model"][key] = "mit"
    file.write_text(yaml.safe_dump(recipe_content))
    with pytest.raises(UserError, match=f"model.{former}: unknown key .fix: did you mean {key}"):
        load_recipe(str(file))


def test_a_run_that_began_with_former_keys_resumes(recipe_content, tmp_path):
    recipe_content["model"]["license"] = "mit"
    recipe, folder = Recipe.model_validate(recipe_content), RunFolder(tmp_path)
    with folder.claimed(recipe, is_main=True):
        (tmp_path / "stages" / "1-projector" / "checkpoint-2").mkdir(parents=True)
    before = json.loads(folder.recipe.read_text())
    before["model"]["licence"] = before["model"].pop("license")
    before["model"]["vision_tower_licence"] = before["model"].pop("vision_tower_license")
    folder.recipe.write_text(json.dumps(before))
    with folder.claimed(recipe, is_main=True):
        assert json.loads(folder.recipe.read_text())["model"]["license"] == "mit"
    recipe_content["model"]["license"] = "llama3.1"
    with (
        pytest.raises(UserError, match="model.license: 'mit' -> 'llama3.1'"),
        folder.claimed(Recipe.model_validate(recipe_content), is_main=True),
    ):
        pass
