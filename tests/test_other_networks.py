"""UNETR and SwinUNETR on the command line: trained, stopped and resumed, predicted with, and exchanged with MONAI."""

import json

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
from flax import nnx

from pgps_jax.architecture import Architecture
from pgps_jax.data.synthetic import write_phantom_dataset
from pgps_jax.errors import InputError
from pgps_jax.exchange import monai_class, write_state_dict
from pgps_jax.interop.nnunet_model import write_checkpoint
from pgps_jax.interop.pickles import read_checkpoint
from pgps_jax.main import EXIT_BAD_INPUT, EXIT_STOPPED, main
from pgps_jax.models import build
from pgps_jax.report.run_log import read_records
from pgps_jax.train import loop
from pgps_jax.train.checkpoint import load_params
from pgps_jax.train.state import split
from pgps_jax.train.stopping import StopRequest

UNETR = ["--network.backbone", "unetr", "--network.unetr.feature-size", "4", "--network.unetr.hidden-size", "8",
         "--network.unetr.mlp-dim", "8", "--network.unetr.num-heads", "2"]  # fmt: skip

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    raw = write_phantom_dataset(folder / "Dataset902_Tiny", num_cases=5, num_test=1, shape=(12, 12, 28))
    assert main(["preprocess", str(raw), "--workspace", str(folder / "work"), "--workers", "1"]) == 0
    return raw, folder / "work"


def command(tiny, name, *more):
    raw, workspace = tiny
    return ["train", str(raw), "--workspace", str(workspace), "--name", name, "--epochs", "2", "--steps-per-epoch", "2",
            "--validation-steps", "1", "--augment.preset", "light", "--no-mirror-tta", "--workers", "1", *UNETR, *more]  # fmt: skip


def run_folder(tiny, name):
    return tiny[1] / "runs" / "Dataset902_Tiny" / name / "fold_0"


class StopsAfterThree(StopRequest):
    """Asks to stop after three steps."""

    @property
    def reason(self):
        self.asked = getattr(self, "asked", 0) + 1
        return "test" if self.asked == 3 else None


@pytest.fixture(scope="module")
def finished(tiny):
    """A run of four steps in two stages, stopped and resumed on the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "StopRequest", StopsAfterThree)
        assert main(command(tiny, "whole")) == EXIT_STOPPED
    assert main(command(tiny, "whole")) == 0
    return run_folder(tiny, "whole")


def segmentation(tiny, run, output):
    assert main(["predict", str(run), "-i", str(tiny[0] / "imagesTs"), "-o", str(output), "--no-mirror-tta"]) == 0
    (file,) = output.glob("*.nii.gz")
    return np.asarray(nibabel.load(file).dataobj)


def test_unetr_trains_in_growing_patches_of_whole_tokens(finished):
    assert [r["step"] for r in read_records(finished / "metrics.jsonl") if r["kind"] == "step"] == [0, 1, 2, 3]
    stages = json.loads((finished / "schedule.json").read_text())["stages"]
    assert [stage["patch_size"] for stage in stages] == [[16, 16, 16], [32, 16, 16]]
    assert {r["stage"] for r in read_records(finished / "metrics.jsonl") if r["kind"] == "step"} == {0, 1}
    plan = json.loads((finished / "plan.json").read_text())["configurations"]["3d_fullres"]
    assert plan["patch_size"] == plan["architecture"]["arch_kwargs"]["table_size"] == [32, 16, 16]


def test_a_run_goes_to_monais_files_and_back_and_predicts_the_same(tiny, finished, tmp_path):
    raw, workspace = tiny
    assert main(["export-monai", str(finished), "-o", str(tmp_path / "monai")]) == 0
    there = json.loads((tmp_path / "monai" / "network.json").read_text())
    assert there["class"] == "monai.networks.nets.UNETR"
    assert there["arguments"]["img_size"] == [32, 16, 16]
    weights = str(tmp_path / "monai" / "fold_0.pt")
    assert main(["import-monai", weights, str(raw), "-o", str(tmp_path / "back"), "--workspace", str(workspace), *UNETR]) == 0
    a, b = segmentation(tiny, finished, tmp_path / "a"), segmentation(tiny, tmp_path / "back", tmp_path / "b")
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("architecture", [
    Architecture("unetr", options={"feature_size": 4, "hidden_size": 8, "mlp_dim": 8, "num_heads": 2, "table_size": (32, 16, 16)}),
    Architecture("swin-unetr", options={"feature_size": 12, "depths": (1, 1, 1, 1), "window_size": (3, 3, 2), "v2": True}),
])
def test_monais_class_loads_exported_weights_strictly_and_computes_the_same(architecture, tmp_path):
    torch, nets = pytest.importorskip("torch"), pytest.importorskip("monai.networks.nets")
    _, shapes = split(nnx.eval_shape(lambda: build(architecture, 1, 3, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(0, 0.2, p.shape).astype(np.float32), shapes)
    write_state_dict(params, architecture, tmp_path / "fold_0.pt")
    name, arguments = monai_class(architecture)
    network = getattr(nets, name)(1, 3, **json.loads(json.dumps(arguments)))
    network.load_state_dict(torch.load(tmp_path / "fold_0.pt", weights_only=True), strict=True)
    image = rng.normal(size=(1, 64, 32, 32, 1) if name == "SwinUNETR" else (1, 32, 16, 16, 1))
    with torch.no_grad():
        theirs = network.double().eval()(torch.from_numpy(np.moveaxis(image, -1, 1))).numpy()
    with jax.enable_x64(True):  # or norms over two voxels make much of float32's rounding
        graphdef, _ = split(nnx.eval_shape(lambda: build(architecture, 1, 3, dtype=jnp.float64, rngs=nnx.Rngs(0))))
        wide = jax.tree.map(lambda p: p.astype(np.float64), params)
        run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x)[0]).lower(wide, image)
        ours = np.moveaxis(np.asarray(run.compile({"xla_backend_optimization_level": 0})(wide, image)), -1, 1)
    np.testing.assert_allclose(ours, theirs, atol=1e-7 * np.abs(theirs).max())


def test_weights_of_another_network_are_not_imported(tiny, finished, tmp_path, capsys):
    raw, workspace = tiny
    assert main(["export-monai", str(finished), "-o", str(tmp_path / "monai")]) == 0
    wrong = [*UNETR[:-1], "4", "--network.unetr.mlp-dim", "16"]
    weights = str(tmp_path / "monai" / "fold_0.pt")
    arguments = ["import-monai", weights, str(raw), "-o", str(tmp_path / "back"), "--workspace", str(workspace), *wrong]
    assert main(arguments) == EXIT_BAD_INPUT
    assert "mlp.linear1" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_a_unet_is_not_monais():
    with pytest.raises(InputError, match="export-nnunet"):
        monai_class(Architecture("plain-unet", (4, 8)))


def test_swin_unetr_is_monais_with_its_names_of_the_options():
    name, arguments = monai_class(Architecture("swin-unetr", options={"v2": True, "window_size": (7, 7, 5)}))
    assert (name, arguments["use_v2"], arguments["window_size"]) == ("SwinUNETR", True, (7, 7, 5))


def test_monais_weights_start_a_run_and_the_report_names_what_did_not_fit(tiny, finished, tmp_path, monkeypatch, capsys):
    """Nothing is trained here: the run is stopped before its first step."""
    assert main(["export-monai", str(finished), "-o", str(tmp_path)]) == 0
    weights = dict(read_checkpoint(tmp_path / "fold_0.pt"))
    weights["rotation_head.weight"] = np.zeros((4, 4), np.float32)
    write_checkpoint(tmp_path / "more.pt", {"state_dict": {f"module.{name}": array for name, array in weights.items()}})

    def stop(run, spoken):
        raise loop.Stopped("test")

    monkeypatch.setattr("pgps_jax.main.train", stop)
    assert main(command(tiny, "tuned", "--pretrained", str(tmp_path / "more.pt"))) == EXIT_STOPPED
    folder = run_folder(tiny, "tuned")
    jax.tree.map(np.testing.assert_array_equal, load_params(folder / "checkpoints"), load_params(finished / "checkpoints"))
    assert "1 skipped" in capsys.readouterr().out
    report = json.loads((folder / "pretrained.json").read_text())
    assert report["skipped"] == {"rotation_head.kernel": "not in this network"}
