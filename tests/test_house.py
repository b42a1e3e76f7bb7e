"""The rules of the house (CONTRIBUTING.md), read off the source: each test lists every offence at once."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from benchmarks import lines
from tests.support import house
from tests.support.house import OUTSIDE, ROOMS, Wall, breaches, circles, crossings, replacements, wrong_imports

ROOT = Path(__file__).resolve().parents[1]
ENTRY_ROOMS = ("examples", "checkpoint_tools")

OURS = " ".join(ROOMS)
HEAVY = "torch transformers megatron datasets safetensors"
PURE = "pure files lead to no torch, so that they answer before it is loaded"
LOADER = (
    "loader dealing order too_long cutting packing index index_checks prefix documents token_files audit checked_files "
    "checksums"
)
OFFLINE = "directory store_metadata store_reader store_writer hf_export export_sums model_files provenance workers"

# The walls inside the rooms; those between them are ROOMS. They hold for imports that are made at run time, those
# inside functions too. In an `order` a file imports only what is named after it.
WALLS = (
    Wall(
        files="engine/*",
        order="rehearsal/ train metric_lines garbage trainer startup_lines guards/ run_start prepare check_model "
        "run_data base_model first_weights checkpointing/ retention step optim mesh costs host reporting/ signals "
        "time_limit changes check_values cli mcore_fields schedule config run_status run_lock run_folder cuda_setup "
        "fp8 layout quiet",
        why="inside engine/ imports point down the list, and nothing knows of the rehearsal at its top",
    ),
    Wall(
        files="models/*",
        order="build te_spec native_spec frame backend model_directory hf_config description families/ layers/ "
        "conversion/",
        why="inside models/ imports point down the list",
    ),
    Wall(
        files="data/*",
        order=f"preparation/ {LOADER}",
        why="inside data/ imports point down the list",
    ),
    Wall(
        files="models/layers/*",
        closed=f"{OURS} safetensors",
        but="models.layers",
        why="layers know neither files nor descriptions",
    ),
    Wall(
        files="models/families/*",
        closed=f"{OURS} safetensors",
        but="models.families models.conversion.rules",
        why="families know no files",
    ),
    Wall(
        files="models/conversion/*",
        closed=OURS,
        but="models.conversion",
        why="conversion knows no descriptions",
    ),
    Wall(
        files=" ".join(f"engine/checkpointing/{name}.py" for name in OFFLINE.split()),
        closed="engine.mesh megatron torch.distributed",
        but="torch.distributed.checkpoint",
        why="the offline readers and writers of checkpoints know no mesh",
    ),
    Wall(
        files=" ".join(f"data/{name}.py" for name in LOADER.split()),
        closed="data.preparation transformers tokenizers jinja2",
        why="the loader knows no templates",
    ),
    Wall(
        files="engine/reporting/*",
        closed="engine torch",
        but="engine.reporting engine.run_folder torch.utils.tensorboard",
        why="reporting knows nothing of signals or training",
    ),
    Wall(
        files="engine/layout.py engine/schedule.py engine/config.py engine/check_values.py engine/run_folder.py "
        "engine/run_lock.py engine/run_status.py engine/time_limit.py engine/mcore_fields.py engine/cli.py",
        closed=HEAVY,
        deep=True,
        why=PURE,
    ),
)

# Apart from the table, because what breaches another wall often leads a script to torch as well.
SCRIPTS = Wall(
    files="examples/prepare_data.py examples/pretrain_sft.py examples/evaluate.py examples/lr_sweep.py "
    "examples/plan_run.py examples/rehearsal_model.py examples/lathe.py examples/submit.py examples/jobs.py "
    "checkpoint_tools/hf_to_mcore.py "
    "checkpoint_tools/mcore_to_hf.py checkpoint_tools/average_steps.py checkpoint_tools/inspect_checkpoint.py "
    "checkpoint_tools/common.py checkpoint_tools/publish.py",
    closed=HEAVY,
    lazy=True,
    deep=True,
    why="scripts import what is heavy after their flags, so that --help and a mistyped flag answer at once",
)

FILE_LINES = {"tests": 400}  # others: 300
FUNCTION_LINES = 60

MODEL_NAMES = "llama qwen olmo gpt.?oss mistral mixtral gemma deepseek nemotron smollm granite glm phi.?[0-9]"
ROPE_KIND = re.compile(r"\bllama3\b")  # transformers' name for a way to scale rotary embeddings


def source_files(*rooms: str) -> Iterator[Path]:
    """Python files of these rooms, or of the whole house."""
    for room in rooms or (*ROOMS, *OUTSIDE):
        yield from sorted((ROOT / room).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def parse(path: Path) -> ast.Module:
    return house.parse(read(path))


def offences(root: Path) -> list[str]:
    """All that the imports of a house do wrong."""
    return [*crossings(root), *breaches(root, WALLS), *circles(root)]


def model_names(text: str) -> list[str]:
    folder = ROOT / "models" / "families"
    families = [path.stem for path in folder.glob("*.py") if re.search("^FAMILY = ", read(path), flags=re.MULTILINE)]
    pattern = "|".join([*MODEL_NAMES.split(), *map(re.escape, families)])
    return re.findall(pattern, ROPE_KIND.sub("", text), flags=re.IGNORECASE)


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def test_files_are_read_in_one_sitting():
    long = {name_of(path): len(read(path).splitlines()) for path in source_files()}
    long = {name: lines for name, lines in long.items() if lines > FILE_LINES.get(name.split("/")[0], 300)}
    assert long == {}, "a room is missing where a file outgrows its limit"


def test_functions_fit_on_a_screen():
    long = [
        f"{name_of(path)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in source_files()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= FUNCTION_LINES
    ]
    assert long == []


def test_scripts_answer_before_torch_is_loaded(tmp_path):
    assert breaches(ROOT, [SCRIPTS]) == []
    house.copy(ROOT, tmp_path)
    with (tmp_path / "checkpoint_tools" / "common.py").open("a", encoding="utf-8") as stream:
        stream.write("def f():\n    import torch\nfrom models.build import PackedModel\n")
    found = breaches(tmp_path, [SCRIPTS])
    # who import it, and itself
    tools = ("hf_to_mcore", "mcore_to_hf", "average_steps", "inspect_checkpoint", "publish", "common")
    assert {offence.split(":")[0] for offence in found} == {f"checkpoint_tools/{name}.py" for name in tools}
    assert all("models/build.py" in offence or "models.build" in offence for offence in found)


def test_imports_point_one_way():
    assert crossings(ROOT) == []


def test_no_import_goes_through_a_wall():
    assert breaches(ROOT, WALLS) == []


def test_no_files_import_each_other_in_a_circle():
    assert circles(ROOT) == []


def test_the_table_of_walls_names_what_stands():
    assert house.idle(ROOT, WALLS) == []


def test_only_the_mesh_touches_parallel_state():
    users = {
        name_of(path)
        for path in source_files(*ROOMS)
        for token in tokenize.generate_tokens(io.StringIO(read(path)).readline)
        if token.type == tokenize.NAME and token.string == "parallel_state"
    }
    assert users == {"engine/mesh.py"}


def test_only_the_host_replaces_foreign_code():
    found = {name_of(path): replacements(parse(path)) for path in source_files(*ROOMS)}
    assert found.pop("engine/host.py"), "the check must see what engine/host.py does"
    assert {name: places for name, places in found.items() if places} == {}


def test_model_names_stay_in_their_families():
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for room in ("engine", "models", "data", "checkpoint_tools")
        for path in source_files(room)
        if path.parent.name != "families"
        for number, line in enumerate([path.stem, *read(path).splitlines()])
        if model_names(line)
    ]
    assert found == [], "what depends on a model's name belongs in models/families/"


def test_entry_scripts_have_a_main_guard():
    # megatron-core's checkpoint writer starts processes that import the script: without a guard a save hangs.
    unguarded = []
    for path in source_files(*ENTRY_ROOMS):
        body = parse(path).body
        has_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body)
        runs = [node for node in body if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)]
        if runs or (has_main and not any(map(is_main_guard, body))):
            unguarded.append(name_of(path))
    assert unguarded == []


def test_no_script_hides_a_module():
    # A script's folder comes first on sys.path, so its neighbours hide what bears the same name.
    taken = {*sys.stdlib_module_names, *ROOMS}
    neighbours = [path for room in ENTRY_ROOMS for path in (ROOT / room).iterdir()]
    neighbours += (ROOT / "examples" / "demo").glob("*.py")
    assert [name_of(path) for path in neighbours if path.stem in taken] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch.cuda.synchronize = print", [(2, "torch.cuda.synchronize")]),
        ("import torch.cuda as c\nc.Event = print", [(2, "c.Event")]),
        ("from torch import nn\ndef f():\n    setattr(nn.Linear, 'forward', f)", [(3, "nn.Linear")]),
        ("import torch\ndel torch.compile", [(2, "torch.compile")]),
        ("import torch\ntorch.backends.cuda.matmul.allow_tf32 = True", []),
        ("import torch\nimport sys\nsys.stdout = 1\nx = torch.zeros(1)\nx.mark = 2", []),
    ],
)
def test_replacements_are_seen(source: str, expected: list[tuple[int, str]]):
    assert replacements(ast.parse(source)) == expected


def test_model_names_are_seen():
    assert model_names('kind == "llama3"  # rope') == []
    assert model_names("class Llama3Model, llama, QWEN2, gpt-oss, gpt_oss, Phi3, Olmo2") == [
        "Llama", "llama", "QWEN", "gpt-oss", "gpt_oss", "Phi3", "Olmo",
    ]  # fmt: skip
    assert model_names("GPTModel, morphism, paragraphs") == []


def test_wrong_imports_are_seen():
    tree = ast.parse("import engine.step\ndef f():\n    from data.index import x\nimport torch")
    assert wrong_imports("models", tree) == [(1, "engine.step"), (3, "data.index")]
    assert wrong_imports("engine", tree) == []


# A file, what is written at its end, and a part of each sentence that its last line then goes against.
BREACHES = [
    ("data/packing.py", "import models.layers.rope", ["nothing points back"]),
    ("engine/quiet.py", "def f():\n    from engine import cli", ["inside engine/"]),
    ("engine/train.py", "import engine.rehearsal", ["inside engine/"]),
    ("engine/extra.py", "", ["inside engine/"]),  # a file that the list does not know
    ("models/model_directory.py", "import models.backend", ["inside models/"]),
    ("data/index.py", "from data.packing import pack", ["inside data/"]),
    ("models/layers/rope.py", "from models.conversion import rules", ["layers know neither files"]),
    ("models/layers/rope.py", "from safetensors import safe_open", ["layers know neither files"]),
    ("models/families/extra.py", "import models.conversion.hf_reader", ["families know no files"]),
    ("models/conversion/extra.py", "from ..layers import rope", ["inside models/", "conversion knows"]),
    (
        "models/conversion/check.py",
        "import rich\nfrom data import packing",
        ["nothing points back", "conversion knows"],
    ),
    ("engine/checkpointing/directory.py", "from engine.mesh import Mesh", ["know no mesh"]),
    ("engine/checkpointing/store_reader.py", "from torch import distributed", ["know no mesh"]),
    ("engine/checkpointing/workers.py", "def f():\n    import torch.distributed", ["know no mesh"]),
    ("engine/checkpointing/hf_export.py", "from megatron.core import utils", ["know no mesh"]),
    ("data/index.py", "def f():\n    from transformers import AutoTokenizer", ["the loader knows no templates"]),
    ("engine/reporting/progress.py", "from engine.signals import largest", ["reporting knows nothing"]),
    ("engine/reporting/progress.py", "import torch.utils", ["reporting knows nothing"]),
    ("engine/layout.py", "def f():\n    import torch", ["pure files"]),
    ("engine/cli.py", "def f():\n    from megatron.core import utils", ["pure files"]),
    ("engine/cli.py", "from models.layers.rope import Rope", ["pure files"]),  # which imports torch
    ("engine/cli.py", "def f():\n    import models.families.common", ["pure files"]),  # through conversion.rules
    ("engine/cli.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch", ["pure files"]),
]
ALLOWED = [
    ("engine/config.py", "if TYPE_CHECKING:\n    import torch, engine.train"),
    ("engine/reporting/metrics.py", "import engine.run_folder\nfrom torch.utils.tensorboard import SummaryWriter"),
    ("engine/checkpointing/workers.py", "from torch.distributed import checkpoint"),
    ("models/families/llama.py", "from models.conversion import rules"),
]


def new_offences(root: Path, sources: dict[str, str]) -> list[str]:
    """What is wrong with a copy of the house only since these sources stand at the end of files of it."""
    house.copy(ROOT, root)
    before = offences(root)
    for file, source in sources.items():
        with (root / file).open("a", encoding="utf-8") as stream:
            stream.write(f"{source}\n")
    return [offence for offence in offences(root) if offence not in before]


@pytest.mark.parametrize(("file", "source", "sentences"), BREACHES)
def test_a_breach_is_named(tmp_path, file: str, source: str, sentences: list[str]):
    found = new_offences(tmp_path, {file: source})
    place = f"{file}:{len((tmp_path / file).read_text().splitlines())}"
    assert [offence.split(" ")[0] for offence in found] == [place] * len(sentences), found
    for offence, sentence in zip(found, sentences, strict=True):
        assert sentence in offence.rpartition(": ")[2]


@pytest.mark.parametrize(("file", "source"), ALLOWED)
def test_what_is_no_breach_is_not_named(tmp_path, file: str, source: str):
    assert new_offences(tmp_path, {file: source}) == []


def test_a_circle_is_named(tmp_path):
    found = new_offences(
        tmp_path,
        {
            "models/layers/one.py": "import torch\nfrom models.layers import two",
            "models/layers/two.py": "def f():\n    import models.layers.one",
        },
    )
    circle = "models/layers/one.py:2 -> models/layers/two.py:2 -> models/layers/one.py"
    assert found == [f"{circle}: {house.NO_CIRCLE}"]


def test_the_way_to_torch_is_named(tmp_path):
    (found,) = new_offences(tmp_path, {"engine/cli.py": "import models.families.common"})
    assert re.search(r"leads to torch \(models/families/common.py:\d+, models/conversion/rules.py:\d+\): pure", found)


def test_every_wall_has_a_breach_above():
    tried = [sentence for *_, sentences in BREACHES for sentence in sentences]
    assert [wall.why for wall in WALLS if not any(sentence in wall.why for sentence in tried)] == []


def test_what_the_table_names_in_vain_is_seen():
    walls = [Wall(files="models/layers/* engine/gone.py", why=""), Wall(files="data/*", order="lost/ index", why="")]
    assert house.idle(ROOT, walls) == ["engine/gone.py", "data/lost/*"]


def test_the_readme_says_how_large_the_rooms_are():
    table = re.findall(r"^\| `(\w+)/` \|.*\| ([\d,]+) \| ([\d,]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    said = {room: (int(files), int(number.replace(",", ""))) for room, files, number in table}
    sizes = lines.count(ROOT)
    found = {room: lines.total(sizes, [room]) for room in lines.ROOMS}
    assert said == {room: pytest.approx(size, rel=0.05) for room, size in found.items()}, "see `make lines`"


def test_lines_are_those_of_wc(capsys):
    files = [name_of(path) for path in source_files()]
    printed = subprocess.run(["wc", "-l", *files], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    counted = {file: int(number) for number, file in map(str.split, printed.splitlines())}
    whole = counted.pop("total")
    expected = {
        folder: (len(within), sum(within))
        for folder in {file.rpartition("/")[0] for file in files}
        if (within := [number for file, number in counted.items() if file.rpartition("/")[0] == folder])
    }
    assert lines.count(ROOT) == expected
    lines.main()
    *_, library, everything = capsys.readouterr().out.replace(",", "").splitlines()
    assert everything.split()[-2:] == [str(len(files)), str(whole)]
    shared = [
        number for file, number in counted.items() if file.startswith(("engine/", "models/", "data/", "checkpoint_"))
    ]
    assert library.split()[-2:] == [str(len(shared)), str(sum(shared))]
