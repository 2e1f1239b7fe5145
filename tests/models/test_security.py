"""No code from a model or data folder runs. Each folder below holds a canary, code that would leave a file behind."""

import ast
import json
import pickle
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import byte_level_tokenizer, save, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from switchkd.base.errors import DataError, ModelError, SwitchKDError
from switchkd.data.examples import Example, load_examples
from switchkd.data.fields import Message
from switchkd.data.templates import Encoder
from switchkd.models.adapters import add_adapter
from switchkd.models.loading import load_model, load_tokenizer
from switchkd.models.pair import load_pair
from switchkd.models.settings import ModelConfig
from switchkd.training.checkpoint import load_weights, save_model

ROOT = Path(__file__).parents[2]


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def code_that_makes(file: Path) -> str:
    return f"from pathlib import Path\nPath({str(file)!r}).touch()\nclass Own: pass\ndef generate(*a, **k): pass\n"


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """The file that no test may leave behind, and the code that would make it; the working directory is importable."""
    file = tmp_path / "canary"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield SimpleNamespace(file=file, code=code_that_makes(file))
    assert not file.exists(), "code from a folder ran"


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "model")


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))


def test_the_canaries_sing(folder, tmp_path, monkeypatch):
    """The negative control: where somebody trusts it, the code of these folders runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path / "modules")])
    sung = [tmp_path / name for name in ("pickle", "config", "generate")]
    pickle.loads(pickle.dumps(Touch(sung[0])))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code_that_makes(sung[2]))
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    (folder / "modeling_evil.py").write_text(code_that_makes(sung[1]))
    edit(folder / "config.json", auto_map={"AutoConfig": "modeling_evil.Own"}, model_type="evil")
    with pytest.raises(AttributeError):  # it is no config, but by then it has run
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert all(file.exists() for file in sung)


def test_own_code_of_model_config_and_tokenizer(folder, canary):
    (folder / "modeling_evil.py").write_text(canary.code)
    for name, model_type in (("AutoModelForCausalLM", "llama"), ("AutoConfig", "evil")):
        edit(folder / "config.json", auto_map={name: "modeling_evil.Own"}, model_type=model_type)
        with pytest.raises(ModelError, match=r"needs its own code \(auto_map in config\.json\)"):
            load_pair(str(folder), str(folder), device="cpu")
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "modeling_evil.Own"]}, tokenizer_class="EvilTokenizer",
    )  # fmt: skip
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_tokenizer(str(folder))


def test_own_code_for_generation(folder, canary, tmp_path):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(canary.code)
    model = load_model(str(folder), device="cpu")
    assert "generate" not in vars(model)
    load_weights(folder, model)  # as a checkpoint


def test_pickled_weights(folder, canary):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(canary.file)))
    with pytest.raises(ModelError, match=r"no \*\.safetensors but pytorch_model\.bin; only safetensors are read"):
        load_model(str(folder), device="cpu")
    # beside an unrelated safetensors file, which a first look takes for the weights
    (folder / "other.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/../../x.safetensors", "x.bin", "..", 3, ""]
)
def test_shards_outside_the_folder(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model-1.safetensors").write_bytes(b"")
    edit(folder / "model.safetensors.index.json", weight_map={"lm_head.weight": name}, metadata={})
    with pytest.raises(ModelError, match=r"index\.json (names the shard .* in its folder|cannot be read: weight_map)"):
        load_model(str(folder), device="cpu")


def test_a_link_to_weights_elsewhere_is_followed_as_in_a_hubs_cache(folder):
    (folder / "model.safetensors").rename(folder.parent / "blob")
    (folder / "model.safetensors").symlink_to(folder.parent / "blob")
    load_model(str(folder), device="cpu")
    (folder.parent / "blob").write_bytes(pickle.dumps({}))
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(folder), device="cpu")


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(folder, tmp_path):
    pytest.importorskip("peft")
    model = load_model(str(folder), device="cpu")
    add_adapter(model, ModelConfig(use_peft=True, lora_r=2), 0)
    save_model(tmp_path / "adapter", model, tiny_tokenizer())
    return tmp_path / "adapter"


def test_an_adapters_pickled_weights(adapter, canary):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Touch(canary.file)))
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read"):
        load_model(str(adapter), device="cpu")


def test_an_adapters_base_is_checked_as_any_model(adapter, folder, canary):
    (folder / "modeling_evil.py").write_text(canary.code)
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Own"})
    with pytest.raises(ModelError, match="needs its own code"):
        load_model(str(adapter), device="cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "megatron.evil"}, "has megatron_config set"),
        ({"auto_mapping": {"base_model_class": "Own", "parent_library": "evil"}}, None),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path must be str"),
        ({"base_model_name_or_path": "../../nowhere"}, "does not exist"),
        ({"r": "x"}, "r must be int, got 'x'"),
        ({"peft_type": ["LORA"]}, "peft_type"),
    ],
)
def test_what_an_adapters_settings_name(adapter, canary, changes, words):
    for module in (Path("evil.py"), Path("megatron/evil.py")):
        module.parent.mkdir(exist_ok=True)
        module.write_text(canary.code)
    edit(adapter / "adapter_config.json", **changes)
    if words is None:
        load_model(str(adapter), device="cpu")  # nothing that is read
        return
    with pytest.raises(ModelError, match=words):
        load_model(str(adapter), device="cpu")


SLOW = r"(\w+\.?)*!"  # goes back and forth for longer than the world will stand


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"rank_pattern": {SLOW: 4}},
        {"alpha_pattern": {SLOW: 4}},
        {"layers_to_transform": [0], "layers_pattern": [SLOW]},
    ],
)
def test_a_regular_expression_of_an_adapter_that_takes_for_ever(adapter, monkeypatch, changes):
    monkeypatch.setattr("switchkd.base.limits.SECONDS", 1)
    edit(adapter / "adapter_config.json", **changes)
    with pytest.raises(ModelError, match="adapter: its regular expressions took more than 1 s"):
        load_model(str(adapter), device="cpu")


def grows(pattern):
    twice = {"type": "Replace", "pattern": pattern, "content": "aa"}
    return {"type": "Sequence", "normalizers": [twice] * 40}


@pytest.mark.parametrize(
    ("pattern", "limit"), [({"String": "a"}, ("SECONDS", 1)), ({"Regex": "a|b"}, ("MEMORY", 2**27))]
)
def test_a_normaliser_whose_text_grows_without_end(folder, monkeypatch, pattern, limit):
    monkeypatch.setattr(f"switchkd.base.limits.{limit[0]}", limit[1])
    edit(folder / "tokenizer.json", normalizer=grows(pattern))
    words = "1 s" if limit[0] == "SECONDS" else "134,217,728 bytes of memory"
    with pytest.raises(ModelError, match=rf"tokenizer\.json: it took more than {words} on short texts and was stopped"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000 in config.json, and at most 10,000"),
        ({"num_labels": 10**9}, "num_labels is 1,000,000,000"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1,000,000,000"),
        ({"vocab_size": 10**9}, "describes a model that is far larger than its weights"),
        ({"hidden_size": 2**20}, "describes a model that is far larger than its weights"),
        ({"intermediate_size": 10**10}, "describes a model that is far larger than its weights"),
    ],
)
def test_a_small_config_of_a_model_without_end(folder, changes, words):
    edit(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=words):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize("text", ["[]", "[" * 200_000, '"x"', "", "\0", '{"a": 1, "a": 2}'])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json", "tokenizer.json"]
)
def test_json_of_a_model_folder_that_is_no_object(folder, name, text):
    (folder / name).write_text(text)
    try:
        load_pair(str(folder), str(folder), device="cpu")
    except SwitchKDError as error:
        assert str(folder) in str(error)


# --- templates and data -----------------------------------------------------------------------------------------------

TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "import": "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "include": "{% include '/etc/passwd' %}",
    "long loop": "{% for i in range(10**12) %}a{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "division": "{{ 1 // 0 }}",
    "types": "{{ messages + 1 }}",
    "syntax": "{% for %}",
    "write": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_malicious_chat_template_runs_in_a_sandbox_and_is_named(canary, name):
    encode = Encoder(byte_level_tokenizer(template=TEMPLATES[name]), "chat")
    [example] = [Example(0, (Message("user", "a"),), "b", ("b",), "data.jsonl:1")]
    with pytest.raises(DataError, match=r"data\.jsonl:1: the chat template refuses the turns user"):
        next(encode([example]))


@pytest.mark.skipif(find_spec("datasets") is None, reason="needs the package datasets")
def test_a_data_sets_script(canary, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    Path("own/script").mkdir(parents=True)
    Path("own/script/script.py").write_text(canary.code)
    with pytest.raises(DataError, match=r"hub:own/script:train: cannot be read.*script"):
        load_examples("hub:own/script:train")


# --- the sources ------------------------------------------------------------------------------------------------------

BANNED = {
    "eval", "exec", "__import__", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads", "shelve.open",
    "torch.load", "torch.save", "joblib.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
}  # fmt: skip
ALLOWED = {("plain.py", "yaml.load")}  # with a subclass of SafeLoader


def dangerous(source: str) -> list[str]:
    """Calls that run what a file says, shells, and trust in remote code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found += [name] if (name := ast.unparse(node.func)) in BANNED else []
            arguments = {argument.arg: ast.unparse(argument.value) for argument in node.keywords}
            found += [f"{name}={arguments[name]}" for name in ("shell", "trust_remote_code", "allow_pickle")
                      if arguments.get(name, "False") != "False"]  # fmt: skip
            # Loading by one's own class runs no code of a model, but may ask a person whether it should.
            if name.endswith("from_pretrained") and arguments.get("trust_remote_code") is None:
                found.append(name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            found += [
                name for name in names if name in ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
            ]
    return found


FROM_PRETRAINED = {  # of classes that know no remote code
    "adapters.py": "peft.LoraConfig.from_pretrained",
    "served_teacher.py": "GenerationConfig.from_pretrained",
}


def test_no_call_in_the_sources_runs_what_a_file_says():
    for file in sorted((ROOT / "switchkd").rglob("*.py")):
        found = [name for name in dangerous(file.read_text()) if (file.name, name) not in ALLOWED]
        assert [name for name in found if name != FROM_PRETRAINED.get(file.name)] == [], file.name


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from joblib import load", "torch.load(f)", "eval(text)", "subprocess.run(x, shell=True)", "np.load(f)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "AutoModel.from_pretrained(x)", "yaml.load(f)",
    ],
)  # fmt: skip
def test_the_search_would_find(line):
    assert dangerous(line)


def test_every_dependency_has_a_lower_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [one for some in project["optional-dependencies"].values() for one in some]
    others = [one for one in [*project["dependencies"], *extras] if not one.startswith("switchkd[")]
    assert [one for one in others if ">=" not in one] == []
