"""The house has floors: a file imports only from rooms below it (BUILD.md, architecture)."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "pgps_jax"

# Lowest first. A file may import from the floors below its own, and from its own floor as long as that makes no circle.
FLOORS: list[set[str]] = [
    {"__init__", "errors", "json_file", "folder_lock", "architecture", "host_memory", "data.__init__", "train.__init__", "infer.__init__",
     "evaluate.__init__", "interop.__init__", "report.__init__"},
    {"data.b2nd", "data.labels", "data.nifti", "data.resample", "interop.parameter_tree", "interop.pickles", "interop.nnunet_names",
     "interop.monai_names", "interop.nnunet_model", "interop.pretrained", "models.conv", "models.conv_cpu", "models.blocks",
     "models.attention", "evaluate.paired", "train.spatial", "train.intensity", "train.accumulate", "report.run_log"},
    {"data.dataset", "data.decathlon", "data.doctor", "data.download", "data.explain", "data.findings", "data.fingerprint", "data.folds",
     "data.label_pairs", "data.plan", "data.plan_network", "data.plan_values", "data.planner", "data.repair", "data.synthetic"},
    {"curriculum", "pacing", "data.store", "data.identity", "data.preprocess", "data.sampling", "data.similarity", "data.stray_cases",
     "interop.preprocessed", "models.unet", "models.resenc", "models.unetr", "models.swin_unetr", "models.__init__", "evaluate.metrics",
     "evaluate.surface"},
    {"data.pipeline", "data.class_balance", "train.losses", "train.augment", "train.optim", "evaluate.summary", "evaluate.postprocess",
     "report.schedule", "report.bench", "report.progress", "report.environment", "report.health_summary", "report.doctor_page"},
    {"report.comparison", "train.state", "train.step", "train.memory", "train.programs", "train.checkpoint", "train.checksum",
     "train.device", "train.stopping", "train.only_process", "infer.sliding_window"},
    {"config"},
    {"chosen_network", "inference"},
    {"preparation", "commands", "report.reproduce"},
    {"workspace"},
    {"train.health", "train.meter", "train.setup", "train.pretrained", "train.sizing", "train.online_validation", "train.loop",
     "train.recovery", "train.forecast", "infer.export", "infer.predict"},
    {"validate", "bench"},
    {"exchange"},
    {"main"},
]


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports, wherever in the file the import stands."""
    known = modules()

    def module_of(parts: list[str]) -> str:
        name = ".".join(parts)
        package = ".".join([*parts, "__init__"])
        return name if name in known else package if package in known else module_of(parts[:-1])

    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pgps_jax":
            found |= {module_of([*node.module.split(".")[1:], alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {module_of(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "pgps_jax"}
    return found


def test_every_file_has_a_floor_and_every_floor_only_files_that_exist():
    listed = [name for floor in FLOORS for name in floor]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(modules())


def test_no_file_imports_from_a_floor_above_its_own():
    floor_of = {name: level for level, floor in enumerate(FLOORS) for name in floor}
    steps_up = [f"{name} (floor {floor_of[name]}) imports {other} (floor {floor_of[other]})"
                for name, path in modules().items() for other in imports_of(path) if floor_of[other] > floor_of[name]]
    assert not steps_up


def test_no_two_files_import_each_other_in_a_circle():
    graph = {name: imports_of(path) - {name} for name, path in modules().items()}
    while graph:
        leaves = {name for name, needs in graph.items() if not needs & set(graph)}
        assert leaves, f"import circle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}


def importers(package: str) -> set[str]:
    found = set()
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(n == package or n.startswith(package + ".") for n in names):
                found.add(name)
    return found


def test_each_guest_library_has_one_door():
    assert importers("nibabel") == {"data.nifti"}
    assert importers("grain") == {"data.pipeline"}
    assert importers("orbax") == {"train.checkpoint"}
    assert importers("torch") == set()
    assert importers("pickle") <= {"interop.pickles", "interop.nnunet_model", "interop.preprocessed"}


def test_the_host_side_of_the_data_does_not_import_jax():
    assert {name for name in importers("jax") if name.startswith("data.")} <= {"data.pipeline"}
