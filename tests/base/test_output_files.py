"""Files that a person names are written through and into; files of ours have the mode that the process's umask says."""

import json
import os
import stat
import threading

import pytest
import yaml
from fabricated import metric, run
from tiny import byte_level_tokenizer, pair_on_disk, save_llama

from switchkd.base.errors import DiskError
from switchkd.base.storage import staged_file, staged_folder, write_file, write_output
from switchkd.cli.flags import parse
from switchkd.cli.main import main
from switchkd.evaluation.results import write_results
from switchkd.models.vocabulary import save_tokenizer
from switchkd.reports.tables import save_figure
from switchkd.runs.distil import distil
from switchkd.runs.model_card import public_name
from switchkd.training.settings import TrainConfig, load_recipe


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_mode_that_the_umask_says_whatever_made_them(tmp_path, umask):
    """safetensors writes files that nobody else can read."""
    save_llama(tmp_path / "model", byte_level_tokenizer(), 1)
    with staged_folder(tmp_path / "folder") as staging:
        (staging / "inner").mkdir()
        os.close(os.open(staging / "inner" / "private", os.O_CREAT, 0o600))
        (staging / "plain").touch()
    with staged_file(tmp_path / "file") as staging:
        staging.unlink(missing_ok=True)
        os.close(os.open(staging, os.O_CREAT, 0o600))
    write_file(tmp_path / "text", "")
    write_output(tmp_path / "new" / "output", "")
    for name in ("folder/inner/private", "folder/plain", "file", "text", "new/output"):
        assert mode(tmp_path / name) == 0o666 & ~umask, name


@pytest.mark.parametrize("write", [write_file, write_output])
def test_a_file_that_is_replaced_hands_its_mode_on(tmp_path, write):
    (tmp_path / "a").touch(0o600)
    write(tmp_path / "a", "new")
    assert mode(tmp_path / "a") == 0o600 and (tmp_path / "a").read_text() == "new"


def test_an_output_goes_through_links_and_into_files_pipes_and_devices(tmp_path):
    (tmp_path / "there").write_text("a long text of before")
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "dangling").symlink_to("far/made")
    os.link(tmp_path / "there", tmp_path / "second")
    write_output(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "second").read_text() == "new"
    write_output(tmp_path / "dangling", "made")
    assert (tmp_path / "dangling").is_symlink() and (tmp_path / "far" / "made").read_text() == "made"
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_output(tmp_path / "pipe", "said")
    reader.join()
    assert read == ["said"] and (tmp_path / "pipe").is_fifo()
    (tmp_path / "device").symlink_to(os.devnull)
    write_output(tmp_path / "device", "gone")
    assert (tmp_path / "device").is_char_device()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DiskError, match=r"loop cannot be written: .*symbolic links"):
        write_output(tmp_path / "loop", "")


def test_every_command_writes_its_output_so(tmp_path):
    """A report, a figure, an evaluation with its text beside it, and nothing beside a device."""
    from matplotlib.figure import Figure

    folder = run(tmp_path / "run", [metric(1)])
    for name in ("page", "figure.svg", "scores.json", "scores.completions.jsonl"):
        (tmp_path / name).symlink_to(f"true-{name}")
    assert main(["report", str(folder), "--output-file", str(tmp_path / "page")]) == 0
    save_figure(Figure(), tmp_path / "figure")
    data = {"primary": "strict"}, {"ids": [], "groups": []}, {}, {}
    write_results(tmp_path / "scores.json", *data, write=write_output)
    for name in ("page", "figure.svg", "scores.json", "scores.completions.jsonl"):
        assert (tmp_path / name).is_symlink() and (tmp_path / f"true-{name}").is_file(), name
    (tmp_path / "null").symlink_to(os.devnull)
    write_results(tmp_path / "null", *data, write=write_output)
    assert not (tmp_path / "null.completions.jsonl").exists()


def test_a_page_in_a_run_of_others_writes_through_no_link(tmp_path):
    folder = run(tmp_path / "run", [metric(1)])
    (tmp_path / "mine").write_text("mine")
    (folder / "report.html").symlink_to(tmp_path / "mine")
    assert main(["report", str(folder)]) == 0
    assert (tmp_path / "mine").read_text() == "mine" and not (folder / "report.html").is_symlink()


# --- what others may read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/me/models/qwen", "qwen"), ("~/qwen", "qwen"), ("../qwen", "qwen"), ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("demo", "demo"), ("gsm8k-sample:train", "gsm8k-sample:train"), ("/", "/"), ("", ""),
    ],
)  # fmt: skip
def test_of_a_path_on_this_machine_others_see_its_last_part(name, shown):
    assert public_name(name) == shown


def test_a_tokenizer_says_nothing_of_where_it_was_found(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.init_kwargs |= {
        "vocab_file": "/home/me/vocab.txt",
        "is_local": True,
        "local_files_only": True,
        "unk": "/",
    }
    save_tokenizer(tokenizer, tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["unk"] == "/" and not {"vocab_file", "is_local", "local_files_only", "name_or_path"} & saved.keys()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quiet run of a second, and the folder that everything in it came from."""
    place = tmp_path_factory.mktemp("home")
    config = TrainConfig(
        **pair_on_disk(place), output_dir=str(place / "run"), template="none", max_new_tokens=4, max_steps=1, sample_steps=0,
        per_device_train_batch_size=2, eval_samples=1, eval_max_new_tokens=2, eval_on_start=False, quiet=True,
    )  # fmt: skip
    distil(config)
    return place


def test_a_student_holds_no_path_of_the_machine(finished):
    os.umask(current := os.umask(0))
    for file in (finished / "run" / "student").iterdir():
        assert not any(words in file.read_bytes() for words in (str(finished).encode(), b"is_local")), file
        assert mode(file) == 0o666 & ~current


def test_a_run_that_was_quiet_is_not_so_when_it_goes_on(finished, tmp_path):
    run = finished / "run"
    assert not load_recipe(str(run / "config.yaml")).quiet
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings | {"quiet": True}))  # as runs of before have it
    assert not parse(TrainConfig, ["train", str(tmp_path), "--resume"]).quiet
    assert parse(TrainConfig, ["train", str(tmp_path), "--resume", "--quiet"]).quiet
    assert parse(TrainConfig, ["train", str(tmp_path / "config.yaml")]).quiet  # a recipe is what it says
