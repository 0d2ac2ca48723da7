"""Batches on a tiny random model: what is done, done once, gone on with, and told of what could not be."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from mde_edit.tools import batch, files, spread
from mde_edit.tools import edit as edit_tool
from mde_edit.tools.cache import InversionCache
from mde_edit.tools.cli import main
from mde_edit.tools.rows import read_rows

from .conftest import SOURCE, TARGET, make_pipe


FAST = ["--method", "direct", "--steps", "2", "--optimization-iterations", "1", "--guidance-scale", "3"]
ROW = {"source_prompt": SOURCE, "prompt": TARGET, "object": {"dog": "dog.png"}, "attribute": {"red": "red.png"}}


@pytest.fixture(scope="session")
def tiny_model(components, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_pipe(components).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    """A folder with pictures p0.png, ..., and masks."""
    return write_pictures(tmp_path / "data", 3)


def write_pictures(folder, count):
    folder.mkdir()
    y, x = np.mgrid[0:32, 0:32]
    for number in range(count):
        waves = np.stack([np.sin(x / (3 + number % 7)), np.cos(y / (2 + number % 5)), np.sin((x + y + number) / 9)], -1)
        PIL.Image.fromarray((waves * 100 + 127).astype(np.uint8)).save(folder / f"p{number}.png")
    for name, (top, left) in {"dog": (8, 8), "red": (2, 12)}.items():
        mask = np.zeros((32, 32), np.uint8)
        mask[top : top + 14, left : left + 12] = 255
        PIL.Image.fromarray(mask).save(folder / f"{name}.png")
    return folder


def write_rows(folder, rows):
    lines = [row if isinstance(row, str) else json.dumps({**ROW, **row}) for row in rows]
    (folder / "edits.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "edits.jsonl"


def command(rows, model, out, *more):
    return ["batch", str(rows), "--model", model, *FAST, "--out", str(out), *more]


def table(out):
    with open(out / "batch.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pictures(out):
    """{name: pixels} of every edit."""
    return {str(path.relative_to(out)): PIL.Image.open(path).tobytes() for path in sorted(out.glob("*/edited*.png"))}


def without_seconds(rows):
    return [{name: value for name, value in row.items() if not name.endswith("_seconds")} for row in rows]


@pytest.fixture
def counted(monkeypatch):
    """The rows that were edited, and the pictures that were inverted, since it was last cleared."""
    done = {"edits": [], "inversions": 0}
    whole_edit, whole_invert = batch.edit, batch.invert

    def edit(request, *rest, **more):
        done["edits"].append(request.args)
        return whole_edit(request, *rest, **more)

    def invert(*args):
        done["inversions"] += 1
        return whole_invert(*args)

    monkeypatch.setattr(batch, "edit", edit)
    monkeypatch.setattr(batch, "invert", invert)
    return done


def test_rows_are_edited_as_edit_does_it_once_and_again_when_changed(tiny_model, data, tmp_path, counted, capsys):
    several = [TARGET, "a tiger wearing a blue hat"]
    masks = {"object": [{"dog": "dog.png"}, {"tiger": ["dog.png", "word:cat"]}], "attribute": [{"red": "red.png"}, {}]}
    rows = [
        {"image": "p0.png", "name": "first"},
        {"image": "p0.png", "oal_weight": 2, "eta": 0.5, "seed": 3},
        {"image": "p1.png", "prompt": several, **masks, "eta": 0.5, "seed": 3},
        {"image": "p2.png", "steps": 3, "preset": "released", "object": {"dog": "word:cat"}},
    ]
    file, out = write_rows(data, rows), tmp_path / "out"
    assert main(command(file, tiny_model, out, "--edits-per-pass", "1")) == 0
    assert "4 of 4 rows edited, 0 of them before" in capsys.readouterr().out
    assert counted["inversions"] == 3 and len(counted["edits"]) == 4  # two rows are of one picture
    assert list(pictures(out)) == [
        "00002/edited.png",
        "00003/edited_0.png",
        "00003/edited_1.png",
        "00004/edited.png",
        "first/edited.png",
    ]
    # the table: a line per edited picture, with what was used and what came of it
    lines = table(out)
    assert [line["picture"] for line in lines][2:4] == ["00003/edited_0.png", "00003/edited_1.png"]
    assert [line["prompt"] for line in lines][2:4] == several
    assert [line["steps"] for line in lines] == ["2", "2", "2", "2", "3"] and lines[4]["ccl_form"] == "spatial_ratio"
    record = json.loads((out / "00002" / "run.json").read_text())
    assert record["settings"]["oal_weight"] == 2 and record["inversion"] is None  # it was there already
    assert lines[1]["background_psnr"] == str(record["edits"][0]["background_psnr"])
    assert float(lines[1]["loss"]) == record["edits"][0]["losses"][-1]["loss"]
    assert record["files"].keys() == {str(data / name) for name in ("p0.png", "dog.png", "red.png")}
    sheet = np.asarray(PIL.Image.open(out / "sheet.png").convert("RGB"))
    assert sheet.shape[1] > 1000 and sheet[: sheet.shape[0] // 2].std() > 20

    # the same picture, and the same figures, as by `edit`
    config = {"image": "p1.png", "prompt": several[1], "object": masks["object"][1], "attribute": {}}
    (data / "edit.json").write_text(json.dumps({**ROW, **config, "eta": 0.5, "seed": 3}))
    single = ["--config", str(data / "edit.json"), "--model", tiny_model, *FAST, "--out", str(tmp_path / "single")]
    assert main(["edit", *single]) == 0
    one = json.loads((tmp_path / "single" / "run.json").read_text())
    many = json.loads((out / "00003" / "run.json").read_text())["edits"][1]
    assert {"prompt": several[1], **{name: one[name] for name in many if name != "prompt"}} == many
    assert PIL.Image.open(tmp_path / "single" / "edited.png").tobytes() == pictures(out)["00003/edited_1.png"]

    # a row's prompts together, in fewer passes
    row = write_rows(data, [{**rows[2], "name": "00003"}])
    inverted = ("--cache", str(out / ".inversions"))
    assert main(command(row, tiny_model, tmp_path / "together", *inverted)) == 0
    records = [json.loads((folder / "00003" / "run.json").read_text()) for folder in (tmp_path / "together", out)]
    assert records[0]["edit"]["forwards"] < records[1]["edit"]["forwards"] and records[0]["key"] == records[1]["key"]
    for name, together in pictures(tmp_path / "together").items():
        alone = np.frombuffer(pictures(out)[name], np.uint8).astype(int)
        assert abs(np.frombuffer(together, np.uint8) - alone).max() <= 1
    file = write_rows(data, rows)

    # nothing is done again; of a row, a picture or a mask that changed, what it concerns
    whole, stamps = pictures(out), {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    counted["edits"].clear()
    assert main(command(file, tiny_model, out)) == 0
    assert not counted["edits"] and "4 of them before" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    rows[1]["oal_weight"], rows[2]["prompt"] = 1, several[:1]
    rows[2] |= {"object": masks["object"][0], "attribute": masks["attribute"][0]}
    file = write_rows(data, rows)
    PIL.Image.open(data / "p1.png").rotate(180).save(data / "p2.png")
    assert main(command(file, tiny_model, out)) == 0
    assert [args.image for args in counted["edits"]] == [str(data / f"p{number}.png") for number in (0, 1, 2)]
    assert counted["inversions"] == 4
    assert pictures(out)["first/edited.png"] == whole["first/edited.png"]
    assert "00003/edited.png" in pictures(out) and "00003/edited_0.png" not in pictures(out)  # nothing stays of before
    # a folder moved elsewhere is the same rows
    counted["edits"].clear()
    moved = data.rename(tmp_path / "moved")
    assert main(command(moved / "edits.jsonl", tiny_model, out)) == 0 and not counted["edits"]
    (out / "first" / "edited.png").unlink()
    assert main(command(moved / "edits.jsonl", tiny_model, out)) == 0 and len(counted["edits"]) == 1


BAD = {  # what is wrong -> the line of the file, what is said of it
    "no JSON": ('{"image": "p0.png"', "this is not JSON: Expecting"),
    "no settings": ("[1]", r"the row holds \[1\], not settings by name"),
    "an unknown setting": ({"promt": "a dog"}, "the row has unknown settings: promt"),
    "a wrong type": ({"steps": "4"}, "`steps` is '4': use a whole number"),
    "out of range": ({"eta": 2}, "`eta` is 2: use a number from 0 to 1"),
    "no picture": ({"image": "none.png"}, "`image` '.*none.png': .*"),
    "not a picture": ({"image": "edits.jsonl"}, "`image` '.*edits.jsonl': cannot identify"),
    "no mask": ({"object": {"dog": "none.png"}}, "`object` `dog` '.*none.png'"),
    "a word that is not in the prompt": ({"object": {"lion": "dog.png"}}, "'lion' is not in the prompt"),
    "masks for too few prompts": ({"prompt": [TARGET] * 3, "object": [{}] * 2}, "has 2 sets of masks for 3 prompts"),
    "a contradiction": ({"inversion": "x.safetensors"}, "`image`, `source_prompt`: the file of --inversion"),
    "nothing to do": ('{"image": "p0.png", "source_prompt": "a cat"}', "missing `prompt`"),
    "a name of another": ({"name": "good"}, "`name` 'good' is that of edits.jsonl, line 1 too"),
    "a name of no folder": ({"name": "../x"}, "`name` '../x' cannot be a folder's"),
    "a segmenter that is not told": ({"object": {"dog": "box:1,2,3,4"}}, "needs --segmenter"),
    "a name that case alone tells apart": ({"name": "Good"}, "`name` 'Good' is that of edits.jsonl, line 1 too"),
    "a name that nobody can read": ({"name": "a\0b"}, "it holds a character that nobody can see"),
    "half a character": ({"name": "\ud83d"}, "it holds a character that nobody can see"),
    "a name longer than a folder's": ({"name": "猫" * 86}, "has 258 bytes: shorten it to 200"),
    "a picture that no file can be": ({"image": "a\0.png"}, "`image` "),
}


def with_mistake(mistake):
    return mistake if isinstance(mistake, str) else {"image": "p0.png", **mistake}


def test_a_bad_row_is_named_by_line_and_reason_and_stops_no_other(tiny_model, data, tmp_path, counted, capsys):
    rows = [
        {"image": "p0.png", "name": "good"},
        "",
        *(with_mistake(row) for row, _ in BAD.values()),
        {"image": "p1.png"},
    ]
    file, out = write_rows(data, rows), tmp_path / "out"
    assert main(command(file, tiny_model, out)) == 1
    told = capsys.readouterr().err
    for number, (kind, (_, message)) in enumerate(BAD.items(), 3):
        assert re.search(rf"mde-edit: edits.jsonl, line {number}: .*{message}", told), (kind, told)
    assert f"2 of {len(BAD) + 2} rows edited, 0 of them before; {len(BAD)} could not be (edits.jsonl, line 3," in told
    assert len(counted["edits"]) == 2
    lines = table(out)
    assert [bool(line["error"]) for line in lines] == [False, *[True] * len(BAD), False]
    assert all(re.search(message, line["error"]) for line, (_, message) in zip(lines[1:-1], BAD.values()))
    assert len(pictures(out)) == 2 and PIL.Image.open(out / "sheet.png").width > 0
    # mended, only it is done
    counted["edits"].clear()
    rows[2] = {"image": "p2.png"}
    assert main(command(write_rows(data, rows), tiny_model, out)) == 1
    assert [args.image for args in counted["edits"]] == [str(data / "p2.png")] and not table(out)[1]["error"]


def test_a_mistake_in_the_last_row_is_known_before_the_first_edit(tiny_model, data, tmp_path, counted, capsys):
    file = write_rows(data, [{"image": "p0.png"}, {"image": "p1.png", "object": {"lion": "dog.png"}}])
    assert main(command(file, tiny_model, tmp_path / "out", "--fail-fast")) == 2
    assert re.search("line 2: .*'lion' is not in the prompt", capsys.readouterr().err) and not counted["edits"]


def test_what_goes_wrong_within_an_edit_stops_no_other(tiny_model, data, tmp_path, monkeypatch, capsys):
    whole = batch.edit

    def edit(request, *rest, **more):
        if "p0" in request.args.image:
            raise RuntimeError("out of memory")
        return whole(request, *rest, **more)

    monkeypatch.setattr(batch, "edit", edit)
    file = write_rows(data, [{"image": "p0.png"}, {"image": "p1.png"}])
    assert main(command(file, tiny_model, tmp_path / "out")) == 1
    assert "line 1: RuntimeError: out of memory" in capsys.readouterr().err and list(pictures(tmp_path / "out")) == [
        "00002/edited.png"
    ]


def test_rows_that_fail_today_keep_what_was_made_of_them(tiny_model, data, tmp_path, counted, monkeypatch, capsys):
    """Another model, or a drive that is not there, is no reason to lose a day's edits."""
    file, out = write_rows(data, [{"image": "p0.png"}, {"image": "p1.png"}]), tmp_path / "out"
    assert main(command(file, tiny_model, out)) == 0
    whole, told, loads = pictures(out), table(out), []
    load = batch.load_pipeline
    monkeypatch.setattr(batch, "load_pipeline", lambda args: loads.append(args.model) or load(args))
    assert main(command(file, str(tmp_path / "nowhere"), out)) == 1
    assert len(loads) == 1 and pictures(out) == whole and all(line["error"] for line in table(out))
    (data / "p1.png").rename(tmp_path / "p1.png")
    assert main(command(file, str(tmp_path / "nowhere"), out)) == 1  # and once more, by another mistake
    counted["edits"].clear()
    assert (
        main(command(file, tiny_model, out)) == 1 and "1 of 2 rows edited, 1 of them before" in capsys.readouterr().err
    )
    (tmp_path / "p1.png").rename(data / "p1.png")
    assert main(command(file, tiny_model, out)) == 0 and table(out) == told and not counted["edits"]
    assert {path.name for path in out.glob("0000?/*")} == {"edited.png", "run.json"}
    # changed, it fails; changed again, the former pictures are nobody's
    for row in ({"image": "none.png"}, {"image": "p2.png"}):
        main(command(write_rows(data, [row, {"image": "p1.png"}]), tiny_model, out))
    assert len(counted["edits"]) == 1 and pictures(out)["00001/edited.png"] != whole["00001/edited.png"]
    assert {path.name for path in out.glob("0000?/*")} == {"edited.png", "run.json"}


def test_a_cache_that_cannot_be_written_costs_no_row(tiny_model, data, tmp_path, counted, monkeypatch, capsys):
    file, full = write_rows(data, [{"image": "p0.png"}, {"image": "p1.png"}]), tmp_path / "full"
    with monkeypatch.context() as patched:
        patched.setattr(InversionCache, "put", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        assert main(command(file, tiny_model, tmp_path / "one", "--cache", str(full))) == 0
    assert "keeps no inversion: no space left" in capsys.readouterr().err
    assert main(command(file, tiny_model, tmp_path / "two", "--cache", str(full))) == 0 and counted["inversions"] == 4
    with monkeypatch.context() as patched:  # another user's
        patched.setattr(os, "utime", lambda *_: (_ for _ in ()).throw(PermissionError))
        assert main(command(file, tiny_model, tmp_path / "three", "--cache", str(full))) == 0
    assert counted["inversions"] == 4 and pictures(tmp_path / "one") == pictures(tmp_path / "three")


def test_another_version_of_this_package_inverts_again(tiny_model, data, tmp_path, counted, monkeypatch):
    """The cache, which outlives an --out, tells them apart; a clone that nobody installed works, too."""

    def none(name):
        raise PackageNotFoundError(name)

    file, cache = write_rows(data, [{"image": "p0.png"}]), str(tmp_path / "cache")
    for number, own in enumerate((None, lambda name: "99.0", none)):
        if own is not None:
            monkeypatch.setattr(edit_tool, "version", own)
        out = tmp_path / str(number)
        assert main(command(file, tiny_model, out, "--cache", cache)) == 0 and counted["inversions"] == number + 1
    assert json.loads((out / "00001" / "run.json").read_text())["versions"]["mde_edit"] == "not installed"


@pytest.mark.parametrize(
    "argv,message",
    [
        (["batch", "x.jsonl"], "missing --out"),
        (["batch", "none.jsonl", "--out", "x"], "`rows` 'none.jsonl' cannot be read"),
        (["batch", "EMPTY", "--out", "x"], "holds no line"),
        (["batch", "FOLDER", "--out", "x"], "holds no NAME.json"),
        (["batch", "x.jsonl", "--out", "x", "--steps", "0"], "`steps` is 0"),
        (["batch", "x.jsonl", "--out", "x", "--prompt", "a dog"], "unrecognized arguments: --prompt"),
        (["batch", "x.jsonl", "--out", "x", "--cache-size", "-1"], "`cache_size` is -1"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_a_wrong_command_is_one_line(tmp_path, capsys, argv, message):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "folder").mkdir()
    places = {"EMPTY": str(tmp_path / "empty.jsonl"), "FOLDER": str(tmp_path / "folder")}
    assert main([places.get(word, word) for word in argv]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_is_rows_by_the_names_of_its_files(data):
    (data / "red.png").rename(data / "p0.attribute.straw hat.png")
    (data / "dog.png").rename(data / "p0.object.dog.png")
    (data / "p0.json").write_text(json.dumps({"source_prompt": SOURCE, "prompt": TARGET, "steps": 7}))
    (data / "p1.json").write_text(json.dumps({**ROW, "object": {"dog": "box:1,2,3,4"}, "attribute": {}}))
    PIL.Image.new("L", (8, 8), 255).save(data / "p1.object.dog.png")
    first, second, stray = read_rows(str(data), {"seed": 3, "steps": 9})
    assert (first.where, first.name, first.args.steps, first.args.seed) == ("p0.json", "p0", 7, 3)
    assert first.args.image == str(data / "p0.png")
    assert first.args.object == {"dog": [str(data / "p0.object.dog.png")]}
    assert first.args.attribute == {"straw hat": [str(data / "p0.attribute.straw hat.png")]}
    assert second.error == "`object` is told in it and by p1.object.dog.png: keep one"
    assert stray.where == "p2.png" and "no NAME.json goes with it" in stray.error
    (data / "p0.jpg").write_bytes((data / "p0.png").read_bytes())
    assert "p0.jpg and p0.png are both its picture" in read_rows(str(data), {})[0].error


def test_flags_and_config_are_for_rows_that_do_not_say_otherwise(data, tmp_path):
    rows = write_rows(data, [{"image": "p0.png", "oal_weight": 4, "preset": "released"}])
    (row,) = read_rows(str(rows), {"oal_weight": 2.0, "step_size": 0.5, "preset": "paper"})
    assert (row.args.oal_weight, row.args.step_size, row.args.ccl_form) == (4.0, 0.5, "spatial_ratio")
    own = {"inversion": "x.safetensors", "prompt": "a dog"}
    rows = write_rows(data, [json.dumps(own)])
    (row,) = read_rows(str(rows), {"steps": 4, "method": "direct", "guidance_scale": 3.0})  # the file has its own steps
    assert row.args.inversion == str(data / "x.safetensors") and row.args.guidance_scale == 3


def test_rows_of_an_inversion_and_of_a_segmenter(tiny_model, data, tmp_path, monkeypatch, counted):
    loaded = []

    def load_segmenter(*names):
        loaded.append(names)
        return lambda image, box: np.asarray(PIL.Image.open(data / "dog.png")) > 127

    monkeypatch.setattr(batch, "load_segmenter", load_segmenter)
    file = data / "cat.safetensors"
    inverting = ["--image", str(data / "p0.png"), "--source-prompt", SOURCE, "--out", str(file)]
    assert main(["invert", "--model", tiny_model, *FAST[:4], "--guidance-scale", "3", *inverting]) == 0
    of_file = {"inversion": file.name, "prompt": TARGET, "object": {"dog": "box:1,2,30,40"}, "segmenter": "sam"}
    drawn = {"image": "p0.png", "attribute": {}}
    clicked = {**drawn, "object": of_file["object"], "segmenter": "sam"}
    out = tmp_path / "out"
    assert main(command(write_rows(data, [json.dumps(of_file), drawn, clicked]), tiny_model, out)) == 0
    assert len(set(pictures(out).values())) == 1 and counted["inversions"] == 1
    assert loaded == [("sam", None, "cpu")]  # for both of its rows, and not to check them
    assert table(out)[0]["steps"] == "2" and not table(out)[0]["image"]


class Killed(BaseException):
    """As good as SIGKILL: nothing catches it, and no more is written."""


def test_broken_off_while_a_file_is_written_it_goes_on(tiny_model, data, tmp_path, monkeypatch, counted):
    """Files take their place one after the other: inversion, picture, record. At any of them the run may end."""
    rows = write_rows(data, [{"image": "p0.png"}])
    assert main(command(rows, tiny_model, tmp_path / "whole")) == 0
    for moment in (1, 2, 3):
        out, replaced = tmp_path / str(moment), []

        def replace(source, target, moment=moment, replaced=replaced):
            replaced.append(target)
            if len(replaced) == moment:
                raise Killed
            os.rename(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(files.os, "replace", replace)
            patched.setattr(Path, "unlink", lambda *_, **__: None)  # what is killed tidies nothing up
            with pytest.raises(Killed):
                main(command(rows, tiny_model, out))
        assert not any(job.is_done() for job in jobs_of(rows, tiny_model, out))
        counted["edits"].clear()
        assert main(command(rows, tiny_model, out)) == 0 and len(counted["edits"]) == 1
        assert all(job.is_done() for job in jobs_of(rows, tiny_model, out))
        assert pictures(out) == pictures(tmp_path / "whole")
        assert without_seconds(table(out)) == without_seconds(table(tmp_path / "whole"))
        assert {path.name for path in (out / "00001").iterdir()} == {"edited.png", "run.json"}


def test_of_a_changed_row_that_was_broken_off_neither_version_is_done(tiny_model, data, tmp_path, monkeypatch, counted):
    """Its new picture is there, the record is not: also after it is changed back."""
    out, unlink = tmp_path / "out", Path.unlink
    former = write_rows(data, [{"image": "p0.png"}])
    assert main(command(former, tiny_model, out)) == 0
    whole = pictures(out)

    def replace(source, target):
        if target.name == "run.json":
            raise Killed
        os.rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", replace)
        patched.setattr(Path, "unlink", lambda path, **how: None if path.suffix == ".tmp" else unlink(path, **how))
        with pytest.raises(Killed):
            main(command(write_rows(data, [{"image": "p0.png", "guidance_scale": 7}]), tiny_model, out))
    assert pictures(out) != whole
    for row in ({"image": "p0.png"}, {"image": "p0.png", "guidance_scale": 7}):
        assert not any(job.is_done() for job in jobs_of(write_rows(data, [row]), tiny_model, out))
    assert main(command(write_rows(data, [{"image": "p0.png"}]), tiny_model, out)) == 0 and pictures(out) == whole


class Two:
    """accelerate's state in the first of two processes."""

    is_main_process = True

    def wait_for_everyone(self):
        pass

    @contextmanager
    def split_between_processes(self, inputs):
        yield inputs[: (len(inputs) + 1) // 2]


def test_the_main_process_returns_when_the_others_are_done(tmp_path):
    """An error of before that nobody has tried again yet does not count, nor does what was done before."""
    jobs = [spread.Job(k, tmp_path / str(k) / "run.json", lambda k=k: {"k": k}) for k in range(5)]
    files.write_json(jobs[0].record, {"k": 0})
    files.write_json(jobs[4].record, {"error": "of before"})
    done = []

    def others():
        for job in jobs[3:]:
            time.sleep(0.3)
            files.write_json(job.record, {"k": job.task})

    def work(mine):
        for job in mine:
            files.write_json(job.record, {"k": job.task})
            done.append(job.task)
            yield job

    thread = threading.Thread(target=others)
    thread.start()
    assert spread.spread(jobs, work, Two()) == 1
    assert done == [1, 2] and all(job.is_done() for job in jobs)
    thread.join()


def jobs_of(rows, model, out):
    shared = {"model": model, "method": "direct", "steps": 2, "optimization_iterations": 1, "guidance_scale": 3.0}
    return [spread.Job(row, out / row.name / "run.json", row.key) for row in read_rows(str(rows), shared)]


def test_inversions_are_kept_by_content_and_the_unused_go_first(inversion, tmp_path):
    cache = InversionCache(tmp_path / "cache", 1e9)
    keys = [letter * 64 for letter in "abc"]
    for number, key in enumerate(keys):
        cache.put(key, inversion)
        os.utime(cache.path(key), (number, number))
    (tmp_path / "cache" / "mine.inversion").write_text("not ours")
    size = cache.path(keys[0]).stat().st_size
    left = cache.folder / f".{'d' * 64}.inversion.killed.tmp"
    left.write_bytes(b"0" * size)
    os.utime(left, (0, 0))
    begun = left.with_name(left.name.replace("killed", "begun"))  # just now, by another process
    begun.write_bytes(b"0" * size)
    assert (cache.get(keys[0]).latents == inversion.latents).all()  # used: now b is the oldest of the three
    InversionCache(cache.folder, 2.5 * size).put("e" * 64, inversion)
    assert {path.name for path in cache.folder.iterdir()} == {
        *("mine.inversion", begun.name),
        *(f"{key}.inversion" for key in (keys[0], "e" * 64)),
    }
    cache.path(keys[0]).write_bytes(b"damaged")
    assert cache.get(keys[0]) is None and cache.get(keys[1]) is None


# The same at the size that it is for: `make test-slow`


SLIM = ["--steps", "1", "--optimization-iterations", "0", "--guidance-scale", "1"]  # many edits, not good ones


def launch(processes, *argv):
    alone = [sys.executable, "-m", "mde_edit.tools.cli"]
    several = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), *alone[1:]]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # another number rounds a pixel here and there differently
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*(several if processes > 1 else alone), *argv], env=one_thread, **pipes)


def edit_seconds(out):
    """Seconds from the first record to the last; launching and loading are no matter of the spread."""
    records = sorted(path.stat().st_mtime for path in out.glob("*/run.json"))
    return records[-1] - records[0]


@pytest.mark.slow
def test_two_processes_do_the_same(tiny_model, tmp_path):
    data = write_pictures(tmp_path / "data", 30)
    rows = write_rows(data, [{"image": f"p{number // 2}.png", "oal_weight": 1 + number % 2} for number in range(60)])
    seconds = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        run = launch(processes, *command(rows, tiny_model, out, *SLIM))
        text, _ = run.communicate(timeout=1200)
        assert run.returncode == 0 and "60 of 60 rows edited" in text, text
        seconds[processes] = edit_seconds(out)
    assert pictures(tmp_path / "1") == pictures(tmp_path / "2") and len(pictures(tmp_path / "1")) == 60
    assert without_seconds(table(tmp_path / "1")) == without_seconds(table(tmp_path / "2"))
    print(
        f"60 edits: {seconds[1]:.1f} s in one process, {seconds[2]:.1f} s in two: {seconds[1] / seconds[2]:.2f} times"
    )


@pytest.mark.slow
def test_killed_three_times_two_hundred_edits_are_those_of_an_undisturbed_run(tiny_model, tmp_path):
    data = write_pictures(tmp_path / "data", 100)
    rows = write_rows(data, [{"image": f"p{number // 2}.png", "oal_weight": 1 + number % 2} for number in range(200)])
    out, rng, places = tmp_path / "killed", random.Random(0), []
    for share in (0.25, 0.5, 0.75):
        run = launch(1, *command(rows, tiny_model, out, *SLIM))
        target = int(200 * (share + rng.uniform(-0.1, 0.1)))
        while len(list(out.glob("*/run.json"))) < target and run.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))  # anywhere in an edit
        run.send_signal(signal.SIGKILL)
        run.communicate()
        places.append(len(list(out.glob("*/run.json"))))
        assert places[-1] < 200
    run = launch(1, *command(rows, tiny_model, out, *SLIM))
    text, _ = run.communicate(timeout=1200)
    assert run.returncode == 0 and f"200 of 200 rows edited, {places[-1]} of them before" in text, text
    undisturbed = launch(1, *command(rows, tiny_model, tmp_path / "whole", *SLIM))
    assert "200 of 200 rows edited, 0 of them before" in undisturbed.communicate(timeout=1200)[0]
    assert pictures(out) == pictures(tmp_path / "whole") and len(pictures(out)) == 200
    assert without_seconds(table(out)) == without_seconds(table(tmp_path / "whole"))
    print(f"killed after {places} of 200 edits: the same pictures and table")


@pytest.mark.slow
def test_of_a_thousand_rows_with_fifty_bad_ones_the_others_are_right(tiny_model, tmp_path):
    data = write_pictures(tmp_path / "data", 1)
    kinds = [
        kind for kind in BAD if kind not in ("a name of another", "a contradiction", "no settings", "out of range")
    ]
    kinds = kinds[:10]
    bad = dict(zip(random.Random(0).sample(range(1, 1001), 50), kinds * 5))
    rows = [
        with_mistake(BAD[bad[line]][0]) if line in bad else {"image": "p0.png", "seed": line} for line in range(1, 1001)
    ]
    out = tmp_path / "out"
    run = launch(2, *command(write_rows(data, rows), tiny_model, out, *SLIM))
    text, _ = run.communicate(timeout=3000)
    assert run.returncode and "950 of 1000 rows edited, 0 of them before; 50 could not be" in text, text
    lines = table(out)
    assert len(lines) == 1000 and len(pictures(out)) == 950
    for number, line in enumerate(lines, 1):
        assert line["row"] == f"edits.jsonl, line {number}"
        if number in bad:
            assert re.search(BAD[bad[number]][1], line["error"]) and f"{line['row']}: {line['error']}" in text
        else:
            assert not line["error"] and line["seed"] == str(number) and line["background_psnr"]
    print(f"950 right, 50 named, of {len(kinds)} kinds, {edit_seconds(out):.0f} s")
