"""Reading recipes: places, all errors at once, YAML 1.2 values, extends, overrides, and writing back."""

from __future__ import annotations

from pathlib import Path

import pytest

from relinear.distill.errors import UserError
from relinear.mixers import registry
from relinear.recipes import loader, overrides, units, yaml_text

GOOD = """\
schema: 1
teacher: {model: some/teacher}
layers:
  mixer: rwkv7
  keep: [1, 3]
data: {source: text.txt}
stages:
  - transfer: {}
  - align: {tokens: 2M, lr: 3e-3}
  - glue:
      tokens: 1.5M
      lr: 1e-3
      loss: {kl: 1.0}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a file into the working directory and return its name."""
    monkeypatch.chdir(tmp_path)

    def make(text: str, name: str = "mine.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return make


def errors(name: str, *changes: str) -> list[str]:
    """The lines of the error that loading gives."""
    with pytest.raises(UserError) as error:
        loader.load(name, list(changes))
    return str(error.value).split("\n")


def test_a_good_recipe(write):
    recipe = loader.load(write(GOOD))
    assert recipe.stage("glue").tokens == 1_500_000
    assert recipe.stage("align").lr == 3e-3
    assert [stage.name for stage in recipe.stages] == ["transfer", "align", "glue"]
    assert recipe.place("layers.keep") == "mine.yaml:5: layers.keep"
    assert recipe.place("stages.glue.loss.kl") == "mine.yaml:13: stages.glue.loss.kl"
    assert recipe.place("layers.convert") == "mine.yaml:3: layers.convert"  # not written: its section


def test_five_mistakes_are_five_lines_with_their_places(write):
    text = GOOD.replace("model: some/teacher", "model: some/teacher, revison: main")
    text = text.replace("mixer: rwkv7", "mixer: gatd_deltanet").replace("[1, 3]", "[1, 1]")
    text = text.replace("tokens: 1.5M", "tokens: 1.5Q").replace("{kl: 1.0}", "{kl: high}")
    assert errors(write(text)) == [
        "mine.yaml:2: teacher.revison: unknown key. Did you mean revision?",
        "mine.yaml:4: layers.mixer: unknown mixer 'gatd_deltanet'. Did you mean gated_deltanet? "
        f"Available: {', '.join(registry.names())}",
        "mine.yaml:5: layers.keep: layer 1 is named twice; name each layer once",
        "mine.yaml:11: stages.glue.tokens: expected a count such as 16384, 64k, 2M or 1Mi "
        "(k, M, B are decimal; Ki, Mi binary), found '1.5Q'",
        "mine.yaml:13: stages.glue.loss.kl: expected a number, found 'high'",
    ]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("schema: 1\n", "", "mine.yaml:1: schema: required; add schema=1 to the command, or write it in the recipe"),
        ("schema: 1", "schema: 2", "mine.yaml:1: schema: expected 1, found 2"),
        (
            "{model: some/teacher}",
            "{}",
            "mine.yaml:2: teacher.model: required; add teacher.model=PATH_OR_ID to the command, or write it in",
        ),
        ("data: {source: text.txt}", "data: {}", "add data.source=FILE to the command"),
        ("data: {source: text.txt}\n", "", "data.source: required, as no text is named; add data.source=FILE"),
        ("  keep: [1, 3]\n", "", "mine.yaml:3: layers: neither keep nor convert is given"),
        ("keep: [1, 3]", "keep: all\n  convert: all", "mine.yaml:6: layers.convert: keep is given too"),
        (
            "source: text.txt",
            "source: text.txt, pack: yes",
            "data.pack: expected true or false, found 'yes'; write true",
        ),
        ("source: text.txt", "source: text.txt, mix: {a: 1}", "data.mix: source is given too; remove one of them"),
        ("source: text.txt", "source: None", "mine.yaml:6: data.source: None is a text in YAML; write null"),
        ("source: text.txt", "source: 5", "mine.yaml:6: data.source: expected a text, found 5"),
        ("source: text.txt", "source: text.txt, seq_len: 1", "expected auto or a number of tokens, at least 2"),
        ("source: text.txt", "source: text.txt, valid: 0.9", "expected a file, or a share of the documents"),
        ("  - transfer: {}\n", "", "stages.align: the first stage is align; put - transfer: {} before it"),
        ("- transfer: {}", "- transfer", "stages.item 1: a stage is a key with its settings, found the word alone"),
        ("- align:", "- glue:", "mine.yaml:10: stages.glue: a stage named 'glue' came before"),
        ("- align:", "- calibrate:", "stages.calibrate.lr: unknown key"),
        (
            "- align:",
            "- algin:",
            "unknown stage 'algin'. Did you mean align? Available: transfer, calibrate, matrix, align, glue",
        ),
        ("- glue:", "- transfer: {name: again}\n  - glue:", "stages.again: transfer cannot follow align"),
        ("lr: 3e-3", "lr: 3e-3, lr_final: 1", "stages.align.lr_final: 1 is higher than lr, which is 0.003"),
        ("lr: 3e-3", "lr: -1", "stages.align.lr: expected a number above 0, found -1"),
        ("lr: 3e-3", "lr: .nan", "stages.align.lr: expected a finite number, found nan"),
        ("lr: 3e-3", "learning_rate: 3e-3", "stages.align.learning_rate: unknown key. Did you mean lr?"),
        ("lr: 3e-3", "loss: kl", "stages.align.loss: expected one of l2, mse, relative, cosine, found 'kl'"),
        ("tokens: 2M, ", "", "stages.align.tokens: required; add stages.align.tokens=2M to the command"),
        ("lr: 3e-3", "batch: 8, micro_batch: 3", "stages.align.micro_batch: 3 does not divide batch, which is 8"),
        ("lr: 3e-3", "batch: yes", "stages.align.batch: expected a whole number, found 'yes'"),
        ("lr: 3e-3", "batch: true", "stages.align.batch: expected a whole number, found True"),
        ("lr: 3e-3", "betas: [0.9]", "stages.align.betas: expected two numbers such as [0.9, 0.95], found [0.9]"),
        ("{kl: 1.0}", "{kl: 0}", "stages.glue.loss: every weight is 0, so nothing would be learnt"),
        ("{kl: 1.0}", "kl", "mine.yaml:13: stages.glue.loss: expected a mapping, found 'kl'"),
        ("schema: 1", "schema: 1\nseq_len: 512", "mine.yaml:2: seq_len: unknown key. Did you mean data.seq_len?"),
        ("schema: 1", "schema: 1\nextend: rwkv7", "mine.yaml:2: extend: unknown key. Did you mean extends?"),
        ("schema: 1", "schema: 1\nzzz: 1", "mine.yaml:2: zzz: unknown key. Known here: schema, teacher, layers"),
        (
            "schema: 1",
            "schema: 1\nengine: {offload: cpu}",
            "offload: cpu is DeepSpeed's; write parallel: deepspeed-zero2",
        ),
        ("schema: 1", "schema: 1\nengine: fast", "mine.yaml:2: engine: expected a mapping, found 'fast'"),
        (
            "schema: 1",
            "schema: 1\nteacher: {model: a}",
            "mine.yaml:3: teacher: this key stands here twice (first in line 2)",
        ),
        ("schema: 1", "schema: 1\nmixers: {rwkv7: {gate: 1}}", "mine.yaml:2: mixers.rwkv7.gate: unknown option."),
        ("schema: 1", "schema: 1\nmixers: {rwkv7: {rope: 1}}", "mixers.rwkv7.rope: expected bool, found 1"),
        ("schema: 1", "schema: 1\nmixers: {gdn: {}, gated_deltanet: {}}", "gated_deltanet has its options twice"),
        ("schema: 1", "schema: 1\nmixers: {mamba9: {}}", "mixers.mamba9: unknown mixer 'mamba9'"),
        ("schema: 1", "schema: 1\nseed: !!python/name:os.system x", "seed: the tag tag:yaml.org,2002:python/name"),
        ("some/teacher}", "some/teacher, dtype: bf16}", "found 'bf16'. Did you mean bfloat16?"),
        ("some/teacher}", "some/teacher, trust_remote_code: true}", "teachers never run code of their own here"),
        ("keep: [1, 3]", "keep: [1, 3]\n  overrides: {7-5: rwkv7}", "layers.overrides.7-5: the range 7-5 is empty"),
    ],
)
def test_each_mistake_has_its_line(write, old: str, new: str, line: str):
    assert old in GOOD
    found = errors(write(GOOD.replace(old, new, 1)))
    assert any(line in one for one in found), found
    assert all(one.startswith("mine.yaml:") for one in found)
    assert len(found) <= 3, found


def test_values_are_yaml_1_2():
    tree = yaml_text.read(
        "a: 1e-3\nb: on\nc: 012\nd: null\ne: 0x10\nf: 'None'\ng: 2410.10250x\nh: true\ni: ~\nj: -.5", "f"
    )
    assert tree.value == {
        **{"a": 1e-3, "b": "on", "c": 12, "d": None, "e": 16, "f": "None", "g": "2410.10250x", "h": True},
        **{"i": None, "j": -0.5},
    }
    assert not tree.faults


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *(
            (text, text)
            for text in ("yes", "on", "1e-3", "012", "null", "12345e7", "true", "a: b", "", "2026-11-20", "~")
        ),
        *((number, number) for number in (1e-5, 0.1, 1e22, 7, -3, True, None)),
    ],
)
def test_what_is_written_is_read_back(value, expected):
    found = yaml_text.read(yaml_text.write({"key": value}), "f").value["key"]
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *((5, 5), (2e6, 2_000_000), ("64k", 64_000), ("2M", 2_000_000), ("1.5M", 1_500_000), ("1B", 10**9)),
        *(("4Ki", 4096), ("2Mi", 2**21), ("1_000", 1000), ("16384", 16384), ("0.1k", 100)),
    ],
)
def test_counts(text, number: int):
    assert units.parse_count(text) == number


@pytest.mark.parametrize("text", ["2m", "2K", "k", "", "1.5", "0.0001k", "-1k", True, 1.5, None, "1e", "2 M M"])
def test_wrong_counts(text):
    with pytest.raises(ValueError, match="expected a count such as"):
        units.parse_count(text)


def test_files_that_are_no_recipe(write, tmp_path: Path):
    assert errors("nothing.yaml")[0].startswith("nothing.yaml: no such file, and no shipped recipe of that name.")
    assert "Did you mean rwkv7?" in errors("rwkv8")[0]
    assert errors(str(tmp_path))[0].startswith(f"{tmp_path}: cannot be read (Is a directory)")
    assert "mine.yaml: is empty; a recipe is a mapping" in errors(write(""))[0]
    assert "mine.yaml: holds list" in errors(write("- 1"))[0]
    assert errors(write("schema: 1\nlayers: [1, 2\nseed: 3\n"))[0].startswith("mine.yaml:3: not YAML: ")
    assert errors(write("schema: 1\n\tseed: 3\n"))[0].startswith("mine.yaml:2: not YAML: ")
    assert "not YAML" in errors(write("a: 1\n---\nb: 1\n"))[0]
    assert "nested too deeply" in errors(write("[" * 2000))[0]
    (tmp_path / "bytes.yaml").write_bytes(b"schema: \xff")
    assert errors("bytes.yaml") == ["bytes.yaml: not UTF-8 text (byte 8). Give a YAML file"]


def test_an_alias_that_holds_itself_is_refused(write):
    assert "mine.yaml:2: seed.0: this alias contains itself" in "\n".join(errors(write("schema: 1\nseed: &a [*a]\n")))


def test_overrides(write):
    name = write(GOOD)
    changes = ["stages.glue.tokens=3M", "layers.convert=0-3", "stages.glue.loss={ce: 0.5}", "teacher.revision=a=b"]
    changes += ["mixers.rwkv7.group_norm=true", "data.mix={x/y: 0.9, z.jsonl: 0.1}", "stages.align.betas=0.9,0.99"]
    changes += [
        "max_hours=0.5",
        "stages.glue.clip=",
        "data.mix.a.b.c=0.2",
        "layers.overrides.0-1=gdn",
        "save.dir='1e3'",
    ]
    recipe = loader.load(name, changes)
    glue = recipe.stage("glue")
    assert (glue.tokens, glue.loss.kl, glue.loss.ce, glue.clip) == (3_000_000, 0, 0.5, None)
    assert (recipe.layers.keep, recipe.layers.convert) == (None, "0-3")
    assert recipe.data.source is None and recipe.data.mix == {"x/y": 0.9, "z.jsonl": 0.1, "a.b.c": 0.2}
    assert recipe.teacher.revision == "a=b"
    assert recipe.mixers["rwkv7"]["group_norm"] is True
    assert recipe.stage("align").betas == (0.9, 0.99)
    assert recipe.layers.overrides["0-1"].mixer == "gated_deltanet"
    assert recipe.save.dir == "1e3"
    assert recipe.place("layers.convert") == "command line: layers.convert=0-3: layers.convert"


def test_overrides_address_a_stage_by_its_name(write):
    name = write(GOOD + "  - glue: {name: polish, tokens: 1M}\n")
    recipe = loader.load(name, ["stages.polish.tokens=5k"])
    assert (recipe.stage("polish").tokens, recipe.stage("glue").tokens) == (5000, 1_500_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages", "expected KEY=VALUE, for example stages.glue.tokens=2M"),
        ("=5", "'' is not a path of keys joined by dots"),
        ("a..b=5", "'a..b' is not a path of keys joined by dots"),
        (
            "stages.gleu.tokens=5",
            "there is no stage 'gleu'. Did you mean glue? Stages are addressed by name: transfer,",
        ),
        ("stages.glue=5", "name a setting of the stage, for example stages.glue.tokens=2M"),
        ("teacher.model.x=5", "teacher.model is a plain value and has no 'x' below it"),
        ("layers.keep=[1, 2", "the value is not YAML"),
        ("teacher.revision=None", "None is a text here; write null, or nothing after the =, for no value"),
        ("seeed=3", "seeed: unknown key. Did you mean seed?"),
        ("stages.glue.tokns=3", "stages.glue.tokns: unknown key. Did you mean tokens?"),
        ("a.b.c=3", "a: unknown key."),
        ("seed=-1", "seed: expected a number at least 0, found -1"),
        ("stages.glue.loss={kl: high}", "stages.glue.loss.kl: expected a number, found 'high'"),
        ("layers.keep={every: 0}", "layers.keep: every: expected a whole number, at least 1, found 0"),
    ],
)
def test_wrong_overrides_name_the_flag(write, change: str, message: str):
    found = errors(write(GOOD), change)
    assert len(found) == 1
    assert found[0].startswith(f"command line: {change}: ") and message in found[0]


def test_wrong_overrides_are_reported_together(write):
    assert len(errors(write(GOOD), "nope", "stages.x.y=1", "seed=3")) == 2


def test_override_on_a_recipe_without_stages(write):
    assert "this recipe has none" in errors(write("schema: 1\n"), "stages.glue.tokens=1")[0]


def test_extends(write):
    write(GOOD, "base.yaml")
    child = "extends: base.yaml\nlayers: {convert: {ratio: 0.5}}\ndata: {mix: {a.txt: 1}}\nstages:\n"
    child += "  glue: {tokens: 9M, loss: {ce: 1}}\nsave:\n  keep: 5\n"
    recipe = loader.load(write(child))
    assert recipe.teacher.model == "some/teacher"
    assert (recipe.layers.mixer, recipe.layers.keep, recipe.layers.convert) == ("rwkv7", None, {"ratio": 0.5})
    assert recipe.data.source is None and recipe.data.mix == {"a.txt": 1}
    glue = recipe.stage("glue")
    assert (glue.tokens, glue.lr, glue.loss.kl, glue.loss.ce) == (9_000_000, 1e-3, 0, 1)
    assert recipe.save.keep == 5
    assert recipe.place("stages.glue.tokens") == "mine.yaml:5: stages.glue.tokens"
    assert recipe.place("stages.glue.lr") == "base.yaml:12: stages.glue.lr"
    assert recipe.place("layers.mixer") == "base.yaml:4: layers.mixer"


def test_extends_replaces_a_layer_choice_as_a_whole(write):
    write(GOOD.replace("keep: [1, 3]", "keep: {every: 4, offset: 3}"), "base.yaml")
    recipe = loader.load(write("extends: base.yaml\nlayers: {keep: {ratio: 0.5}}\n"))
    assert recipe.layers.keep == {"ratio": 0.5}


def test_extends_a_shipped_recipe(write):
    name = write("extends: rwkv7\nteacher: {model: a/b}\ndata: {source: x.txt}\nlayers: {keep: [0]}\n")
    recipe = loader.load(name, ["stages.glue.tokens=5k"])
    assert recipe.stage("glue").tokens == 5000 and recipe.layers.convert is None


def test_extends_is_relative_to_the_file(write, tmp_path: Path):
    (tmp_path / "sub").mkdir()
    write(GOOD, "sub/base.yaml")
    write("extends: base.yaml\nseed: 4\n", "sub/child.yaml")
    assert loader.load("sub/child.yaml").seed == 4


def test_errors_in_both_files_have_their_own_places(write):
    write(GOOD.replace("lr: 3e-3", "lr: fast"), "base.yaml")
    found = errors(write("extends: base.yaml\nstages: {glue: {tokens: 1Q}, gleu: {tokens: 1}}\nsave: {keep: 0}\n"))
    assert [one.split(": ")[0] for one in found] == ["base.yaml:9", "mine.yaml:2", "mine.yaml:2", "mine.yaml:3"]
    assert any("the extended recipe has no stage 'gleu'" in one for one in found)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("extends: base.yaml", "mine.yaml:1: extends: base.yaml extends another recipe itself; one level only"),
        ("extends: gone.yaml", "mine.yaml:1: extends: gone.yaml: no such file"),
        ("extends: [a]", "mine.yaml:1: extends: expected a shipped recipe's name or a path, found ['a']"),
        ("extends: list.yaml", "mine.yaml:1: extends: list.yaml is not a mapping of sections"),
    ],
)
def test_wrong_extends(write, first: str, message: str):
    write("extends: rwkv7\n", "base.yaml")
    write("- 1\n", "list.yaml")
    assert errors(write(first + "\n"))[0].startswith(message)


def test_dump_has_every_key_and_loads_back_to_the_same(write):
    recipe = loader.load(write(GOOD), ["teacher.revision='12345e7'", "data.separator=none"])
    text = loader.dump(recipe)
    for word in ("reverse_kl", "shuffle_buffer", "weight_decay", "group_norm", "max_hours"):
        assert word in text
    again = loader.load(write(text, "again.yaml"))
    assert again == recipe
    assert loader.dump(again) == text


def test_run_folder_is_named_after_recipe_and_teacher(write):
    assert loader.load(write(GOOD)).save.dir == "runs/mine-teacher"
    given = ["teacher.model=../big/model-7b", "data.source=f"]
    assert loader.load("rwkv7", given).save.dir == "runs/rwkv7-model-7b"
    assert loader.load("quickstart").save.dir == "runs/quickstart"
    assert loader.load("rwkv7", [*given, "save.dir=here"]).save.dir == "here"


def test_parse_leaves_plain_values_alone():
    assert overrides.parse("data.separator=%%") == (["data", "separator"], "%%")
    assert overrides.parse("data.source=C:\\a b.txt") == (["data", "source"], "C:\\a b.txt")
    assert overrides.parse("seed=012") == (["seed"], 12)
