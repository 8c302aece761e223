"""The experiment of CoCoA: its configurations, its arms at the smallest scale, photographs, its mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from experiments.cocoa import SPEC
from experiments.cocoa.__main__ import main as cocoa
from experiments.cocoa.arms import _steps, build
from experiments.cocoa.pictures import write_reconstructions, write_retrieval
from experiments.cocoa.probe import linear_probe
from lit_core.experiment import ArmContext, Clock
from lit_core.results import write_results
from lit_core.setting import Setting
from lit_embed.data.scenes import SceneConfig, build_scenes, probe_items
from lit_embed.items import ImageFile, Item
from lit_embed.methods.cocoa import CoCoA
from lit_embed.modules.multimodal import build_multimodal_encoder
from lit_embed.modules.multimodal_tokenization import MultimodalConfig
from lit_embed.multimodal import ReconstructionRow, choice_task

SMOKE = ["--scale", "smoke", "--trainer.enable_progress_bar=false"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lightning 2.6 calls what jsonargparse 5 drops


@pytest.mark.parametrize("scale", ["smoke", "tiny", "paper"])
@pytest.mark.parametrize("stage", SPEC.stages)
def test_every_configuration_parses_and_prints(capsys: pytest.CaptureFixture[str], scale: str, stage: str) -> None:
    flags = ["--stage", stage] if scale != "paper" else ["--stage", stage, "--data.path", str(Path(__file__).parent)]
    with pytest.raises(SystemExit) as stop:
        cocoa(["fit", "--scale", scale, *flags, "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert ("Qwen/Qwen2-VL" in printed) == (scale == "paper")
    assert f"stage: {stage}" in printed


def test_the_experiment_builds() -> None:
    experiment = build(Setting(SPEC, "tiny", ()))
    main = {arm.name for arm in experiment.arms if arm.main}
    assert main == {
        "captions",
        "warm",
        "bridge",
        "causal",
        "bidirectional",
        "equal",
        "cocoa",
        "equal_tenth",
        "cocoa_tenth",
    }
    assert {"warm_only", "cold", "strict", "one_way", "cocoa_tenth", "strict_tenth"} <= {
        arm.name for arm in experiment.arms
    }


def test_equal_compute_counts_the_steps_of_stages_in_epochs(tmp_path: Path) -> None:
    """The paper's second stage has two epochs; the first has 3000 steps and the third 2000."""
    setting = Setting(SPEC, "paper", (f"--data.path={tmp_path}",))
    arms = {arm.name: arm for arm in build(setting).arms}
    assert {"warm", "bridge"} <= set(arms["equal"].needs)
    write_results(tmp_path / "bridge", {"bridge_gap": 1.0}, cost={"steps": 77.0})
    needed = {"warm": tmp_path / "warm", "bridge": tmp_path / "bridge"}
    context = ArmContext("cocoa", "paper", "equal", 0, tmp_path, Clock(tmp_path), needed)
    assert _steps(setting, context) == 3000 + 77 + 2000
    assert not {"warm", "bridge"} & set({arm.name: arm for arm in build(Setting(SPEC, "tiny", ())).arms}["equal"].needs)


@pytest.mark.slow
def test_its_arms_end_with_a_report_and_pictures(tmp_path: Path) -> None:
    args = [*SMOKE, "--seeds", "0", "--jobs", "1", "--arms", "cocoa", "causal", "--runs_dir", str(tmp_path)]
    assert cocoa(args) == 0
    folder = tmp_path / "cocoa"
    report = json.loads((folder / "report.json").read_text())
    found = {arm["name"]: arm["metrics"] for arm in report["arms"]}
    assert set(found) == {"captions", "warm", "bridge", "cocoa", "causal"}
    assert {"bridge_gap", "end_shift", "probe"} <= set(found["bridge"])
    assert {"p@1", "p@1/ind", "p@1/ood", "p@1/group/vqa"} <= set(found["cocoa"])
    for name in ("Retrieved_by_CoCoA", "Reconstructed_words", "Attributes_by_a_linear_probe"):
        assert (folder / f"{name}.png").stat().st_size > 5000, name
    config = SceneConfig(  # of smoke.yaml
        train_scenes=64, eval_scenes=8, candidates=8, least_things=1, most_things=2, family=3
    )
    (train, labels), (test, wanted) = (probe_items(build_scenes(config), part) for part in ("train", "test"))  # type: ignore[arg-type]
    (captions,) = (folder / "captions").glob("seed*")
    encoder = build_multimodal_encoder(
        str(captions / "export"), MultimodalConfig(attention="causal")
    )  # as it was trained
    vectors = [encoder.encode(items, "query", progress=False) for items in (train, test)]
    assert json.loads((captions / "probe.json").read_text()) == linear_probe(vectors[0], labels, vectors[1], wanted)
    words = json.loads((folder / "bridge" / "seed0" / "words.json").read_text())
    assert len(words) == 5
    assert all(row["shown"].count("□") >= 1 for row in words)


def photographs(folder: Path) -> Path:
    """Two photographs with questions and answers, in the layout of MMEB's evaluation."""
    images = pytest.importorskip("sklearn.datasets", reason="scikit-learn carries the photographs")
    from PIL import Image

    (folder / "photos").mkdir(parents=True)
    rows = []
    for name, pixels, texts in zip(("china.png", "flower.png"), images.load_sample_images().images,
                                   (["a temple", "a flower"], ["a flower", "a temple"]), strict=True):  # fmt: skip
        Image.fromarray(pixels).resize((112, 84)).save(folder / name)
        rows.append({"qry_text": "<|image_1|> What is shown?", "qry_img_path": name, "tgt_text": texts,
                     "tgt_img_path": ["", ""]})  # fmt: skip
    (folder / "photos" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("backbone", ["tiny-qwen2-vl", "tiny-qwen2_5-vl"])
def test_photographs_and_texts_through_predict_of_an_exported_folder(tmp_path: Path, backbone: str) -> None:
    data, export, out = photographs(tmp_path / "eval"), tmp_path / "export", tmp_path / "out"
    assert cocoa(["export", "--backbone", backbone, "--output", str(export)]) == 0
    args = [*SMOKE, "--data.path", str(data), "--model.backbone", str(export), "--trainer.default_root_dir", str(out)]
    assert cocoa(["predict", *args]) == 0
    ids = json.loads((out / "items.ids.json").read_text())
    found = dict(zip(ids, load_file(out / "items.safetensors")["vectors"], strict=True))
    assert len(found) == 4
    encoder = build_multimodal_encoder(backbone, MultimodalConfig(image_size=56))
    asked = Item("<|image_1|> What is shown?", ImageFile(data / "china.png"))
    expected = torch.cat([encoder.encode([asked], "query"), encoder.encode([Item("a flower")], "passage")])
    given = torch.stack([found[f"{data / 'china.png'}\t{asked.text}"], found["a flower"]])
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_one_command_runs_all_stages_and_the_export_reads_photographs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cocoa(["fit", *SMOKE, "--trainer.default_root_dir", str(run)]) == 0
    for stage in SPEC.stages:
        assert (run / stage / "last.ckpt").is_file()
    results = json.loads((run / "contrastive" / "results.json").read_text())
    assert 0 <= results["metrics"]["p@1"] <= 1
    export = tmp_path / "export"
    assert cocoa(["export", "--ckpt_path", str(run / "contrastive" / "last.ckpt"), "--output", str(export)]) == 0
    data = ["--data.path", str(photographs(tmp_path / "eval"))]
    out = tmp_path / "out"
    common = [*SMOKE, *data, "--trainer.default_root_dir", str(out), "--model.backbone", str(export)]
    assert cocoa(["predict", *common]) == 0
    vectors = load_file(out / "items.safetensors")["vectors"]
    ids = json.loads((out / "items.ids.json").read_text())
    assert len(vectors) == len(ids) == 4
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    assert any("china.png" in name for name in ids)
    assert cocoa(["test", *common]) == 0
    assert "p@1/photos" in json.loads((out / "results.json").read_text())["metrics"]


def test_a_linear_probe_reads_what_is_there() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(300, 8, generator=generator)
    labels: list[dict[str, Any]] = [{"sign": int(row[0] > 0), "noise": n % 3} for n, row in enumerate(vectors)]
    found = linear_probe(vectors[:200], labels[:200], vectors[200:], labels[200:])
    assert found["sign"] > 0.9
    assert found["noise"] < 0.55


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model.target_rate=0", "--stage", "reconstruction"], "target_rate': is a share, above 0 to 1"),
        (["--model.form=two_pass", "--stage", "reconstruction"], "form': form two_pass needs bridge strict or one_way"),
        (["--data.path=nowhere", "--stage", "warmup"], "nowhere"),
        (["--model.backbone=tiny-qwen3", "--stage", "contrastive"], "images need one of qwen2_vl"),
        (["--data.stage=warmup", "--stage", "reconstruction"], "data.stage': must be reconstruction"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], told: str) -> None:
    assert cocoa(["fit", *SMOKE, "--trainer.default_root_dir", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error


@pytest.mark.filterwarnings("ignore:left out")
def test_pictures_leave_out_what_cannot_be_read(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    here, gone = (Item("what is it?", ImageFile(tmp_path / name)) for name in ("a.png", "none.png"))
    right, wrong = Item("a ball"), Item("a ring", gone.image)
    task = choice_task("t", "vqa", None, [(gone, [right, wrong]), (here, [right, wrong])])
    nothing, one = torch.zeros(2), torch.tensor([1.0, 0.0])
    vectors = {"query": {gone.key: nothing, here.key: one}, "passage": {right.key: one, wrong.key: nothing}}
    write_retrieval(tmp_path, vectors, [task])  # type: ignore[arg-type]
    (row,) = json.loads((tmp_path / "retrieval.json").read_text())
    assert (row["query"]["picture"], [found["text"] for found in row["candidates"]]) == (0, ["a ball"])
    config = MultimodalConfig(image_size=56, max_tokens=64, skip_unreadable=True)
    module = CoCoA("tiny-qwen2-vl", "reconstruction", encoder=config)
    module.configure_model()
    rows = [ReconstructionRow(item, "a ball", "t", 0) for item in (gone, here)]
    write_reconstructions(tmp_path, module.eval(), rows)
    assert len(json.loads((tmp_path / "words.json").read_text())) == 1


ASK = "<|image_1|> What is shown?"
QUERY = {"qry": ASK, "qry_image_path": "a.png", "pos_text": "a red ball"}


@pytest.mark.parametrize(
    ("row", "flags", "told"),
    [
        ({"qry_image_path": "broken.png"}, [], "broken.png: cannot be read as an image"),
        ({"qry_image_path": "broken.png"}, ["--data.num_workers=1"], "broken.png: cannot be read as an image"),
        ({"qry_image_path": "none.png"}, [], "rows.jsonl:6: field 'qry_image_path': no such image: "),
        ({"qry_image_path": ""}, [], "rows.jsonl:6: field 'qry': has <|image_1|> in its text, but no image"),
        (
            {"pos_text": f"{ASK} A ball."},
            [],
            "rows.jsonl:6: field 'pos_text': has <|image_1|> in its text, but no image",
        ),
        ({"pos_text": "a <|image_pad|>"}, [], "holds <|image_pad|>, which only an image may bring"),
        (
            {},
            ["--model.encoder.bridge=<|image_pad|>"],
            "field 'bridge': must not be <|image_pad|>, which belongs to im",
        ),
        (
            {},
            ["--model.mask_token=<|image_pad|>"],
            "field 'mask_token': must not be <|image_pad|>, which belongs to im",
        ),
        ({}, ["--model.encoder.bridge=<|endoftext|>"], "field 'bridge': the bridge token must differ from the padding"),
        (
            {},
            ["--model.encoder.max_tokens=6"],
            "a.png: its 4 tokens, their two marks and the end make 7, more than max_t",
        ),
        (
            {},
            ["--model.encoder.max_tokens=7"],
            "a.png: its tokens, their two marks, the end and one token",
        ),
    ],
)
def test_mistakes_in_files_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, row: dict[str, str], flags: list[str], told: str
) -> None:
    from PIL import Image

    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_text("no image")
    rows = [*[QUERY] * 5, QUERY | row]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--data.path", str(tmp_path / "rows.jsonl"), "--data.batch_size=3", "--stage", "reconstruction"]
    assert cocoa(["fit", *SMOKE, "--trainer.default_root_dir", str(tmp_path / "run"), *data, *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error
    assert "Traceback" not in error


@pytest.mark.filterwarnings("ignore:left out")
def test_unreadable_images_and_empty_targets_are_left_out_where_that_is_allowed(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_text("no image")
    rows = [*[QUERY] * 9, QUERY | {"qry_image_path": "broken.png"}, QUERY | {"pos_text": " "}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--data.path", str(tmp_path / "rows.jsonl"), "--data.batch_size=3", "--stage", "reconstruction"]
    flags = ["--model.encoder.skip_unreadable=true", "--trainer.default_root_dir", str(tmp_path / "run")]
    assert cocoa(["fit", *SMOKE, *data, *flags]) == 0
    assert (tmp_path / "run" / "reconstruction" / "last.ckpt").is_file()
