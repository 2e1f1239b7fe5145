"""The documentation as a site: it builds strictly, holds every public name and setting, and needs nothing from outside."""

import dataclasses
import os
import re
import subprocess
import sys
import tomllib

import pytest
from test_docs import PAGES, ROOT, commands_in

import switchkd
from switchkd.training.settings import TrainConfig


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as they are built: their HTML by path. A page that is in no navigation, or a broken link, fails here.

    Without --quiet, which would hide the warnings that strict building counts.
    """
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=os.environ | quiet, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr + built.stdout
    return {str(file.relative_to(folder)): file.read_text(encoding="utf-8") for file in folder.rglob("*.html")}


def test_every_public_name_has_its_entry(site):
    for name in switchkd.__all__:
        assert f'id="switchkd.{name}"' in site["reference/python.html"] or name in ("__version__", "divergences"), name
    assert 'id="switchkd.methods.divergences.jsd"' in site["reference/python.html"]


def test_every_setting_stands_in_a_table_with_words(site):
    page = site["reference/settings.html"]
    for setting in dataclasses.fields(TrainConfig):
        row = re.search(
            rf'<td><a id="{setting.name}"></a>(.*?)</td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>', page, re.DOTALL
        )
        assert row and f"--{setting.name.replace('_', '-')}" in row[1] and len(row[3]) > 15, setting.name


def test_every_rule_stands_on_its_page(site):
    from switchkd.methods.rules import NOUNS

    for noun, (_, known) in NOUNS.items():
        for name, cls in known.items():
            own = {field.name for field in dataclasses.fields(cls)} - {
                field.name for field in dataclasses.fields(NOUNS[noun][0])
            }
            assert f"<code>{name}</code>" in site["reference/rules.html"], name
            assert all(f"--{noun}.{field.replace('_', '-')}" in site["reference/rules.html"] for field in own), name


def test_nothing_is_loaded_from_outside(site):
    for page, html in site.items():
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*src="(https?:[^"]*)"|<link[^>]*href="(https?:[^"]*)"', html)
        assert not loaded, f"{page}: {loaded}"
        assert "{{ " not in html, f"{page}: a table was not filled in"


def test_every_page_is_in_the_navigation():
    found = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")}
    assert {page for page in PAGES if page.startswith("docs/")} == found


def slug(heading):
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere_on_github_too(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)), (
                f"{page}: {link}"
            )


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_no_command_is_a_long_line(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        assert max(map(len, block.splitlines())) <= 100, block
        assert all(len(command) < 600 for command in commands_in(block))


def test_the_version_is_told_once_and_the_same_everywhere():
    assert f"## {switchkd.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {switchkd.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_wheel_holds_what_a_run_needs(tmp_path):
    """Recipes, plans, the data sample, the pages' assets and the list of checksums; and neither tests nor documents."""
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling, of the extra dev, builds the wheel")
    built = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    import zipfile

    names = set(zipfile.ZipFile(next(iter(built))).namelist())
    shipped = {
        f"switchkd/{file.relative_to(ROOT)}" for place in ("recipes", "plans") for file in (ROOT / place).iterdir()
    }
    tracked = subprocess.run(["git", "ls-files", "switchkd"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert names >= shipped | set(tracked)
    assert {
        "switchkd/py.typed",
        "switchkd/models/qwen_coder.txt",
        "switchkd/data/sample/gsm8k_sample.jsonl.gz",
    } <= names
    assert not [name for name in names if not name.startswith(("switchkd/", "switchkd-"))]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"switchkd": "switchkd.cli.main:main"}
