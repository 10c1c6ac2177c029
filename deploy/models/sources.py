"""Where weights come from: one text that names a source, to a local file and its provenance.

```
PATH                                       a checkpoint file, or a folder that holds one as save_pretrained writes it
hf://OWNER/REPO[/FILE][@REVISION]          the Hugging Face Hub, through huggingface_hub and its cache
https://HOST/FILE                          any server; resumed, hashed and kept in the cache folder
random[:SEED]                              drawn, deterministic
pretrained                                 what the recipe names under ``pretrained``
```

``#sha256=HEX`` behind any of the first three pins the content: 64 digits, or the first 8 or more, which is what release
files carry in their name. No torch here: a source can be fetched without it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote, urlsplit

from deploy.artifacts import sha256_of
from deploy.console import Console, Mode
from deploy.errors import CheckpointError, DownloadError, RecipeError

FORMS = "PATH, hf://OWNER/REPO[/FILE][@REVISION], https://..., random[:SEED] or pretrained"
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")

# What trainers leave beside the weights in files of the same types.
_NO_WEIGHTS = re.compile(r"^(training_args|optimizer|scheduler|rng_state.*|scaler|trainer_state)\.")
_USUAL = "model.safetensors"  # transformers, timm and huggingface_hub write this name
_SHOWN = 12
_PIN = re.compile(r"#sha256=(.*)$", re.DOTALL)
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]+)://")  # two letters or more: C:\ is a path
_PRETRAINED_HINT = "--weights " + FORMS + "; or a line `pretrained: ...` in the recipe"

Kind = Literal["random", "file", "url", "hub"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A parsed source text.

    Attributes:
        kind: Where to look.
        location: The path, the URL without its fragment, or ``OWNER/REPO``; empty for random weights.
        file: File inside a repository; empty to take the only one.
        revision: Branch, tag or commit of a repository; empty for its default branch.
        sha256: Pinned digits, 8 to 64 of them, or empty.
        seed: Of random weights.
    """

    kind: Kind
    location: str = ""
    file: str = ""
    revision: str = ""
    sha256: str = ""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """A source that lies on this machine.

    Attributes:
        path: The file; of a download, inside a cache, so it must not be changed.
        name: What people read: ``weights.pth``, ``weights.pth from download.openmmlab.com``.
        source: Source text that gives the same file again, revision resolved; empty for a path.
        revision: Commit of a repository, resolved.
    """

    path: Path
    name: str
    source: str = ""
    revision: str = ""


def parse_source(text: str) -> Source:
    """Read a source text; touches neither disk nor network.

    Raises:
        RecipeError: it is none of the forms, or a form with a part that cannot be.
    """
    if not text.strip() or any(ord(c) < 32 for c in text):
        raise RecipeError(f"weights: got {text!r}, expected {FORMS}", hint="--weights random")
    if text.partition(":")[0] == "random":
        return Source(kind="random", seed=_seed(text))
    body, sha256 = _split_pin(text)
    scheme = _SCHEME.match(body)
    if scheme is None:
        return Source(kind="file", location=body, sha256=sha256)
    match scheme[1].lower():
        case "hf":
            return replace(_parse_hub(body), sha256=sha256)
        case "http" | "https":
            return _parse_url(body, sha256)
        case _:
            raise RecipeError(
                f"weights: {text!r} begins with {scheme[0]}, expected {FORMS}",
                hint="download it yourself, then --weights PATH",
            )


def choose_text(weights: str, pretrained: str | None, model: str) -> str:
    """Return the source text that a recipe asks for: its ``weights``, or what it names as ``pretrained``.

    Args:
        weights: The recipe's ``weights``.
        pretrained: The recipe's ``pretrained``.
        model: System and variant, for the error.

    Raises:
        RecipeError: pretrained weights are asked for and none are named.
    """
    if weights != "pretrained":
        return weights
    if pretrained is None:
        raise RecipeError(f"the recipe of {model} names no pretrained weights", hint=_PRETRAINED_HINT)
    if pretrained == "pretrained" or pretrained.partition(":")[0] == "random":
        raise RecipeError(f"pretrained: got {pretrained!r}, expected a file or an address", hint=_PRETRAINED_HINT)
    return pretrained


def fetch(source: Source, console: Console | None = None) -> Fetched:
    """Bring a source onto this machine and hold it against its pin.

    Args:
        source: A file, a folder with one, a URL or a repository; random weights have no file.
        console: Where progress goes; nowhere when left out.

    Raises:
        CheckpointError: a folder without a checkpoint, or with several.
        DownloadError: it cannot be fetched, or its hash is not the pinned one.
        StorageError: the cache folder cannot be written.
    """
    console = console or Console(Mode.SILENT)
    match source.kind:
        case "file":
            path = checkpoint_file(Path(source.location))
            fetched = Fetched(path=path, name=path.name)
        case "url":
            fetched = _fetch_url(source, console)
        case "hub":
            from deploy.models.hub import fetch_from_hub

            path, file, commit = fetch_from_hub(source.location, source.file, source.revision, console)
            fetched = Fetched(
                path=path,
                name=f"{source.location}/{file} at {commit[:12]} from the Hugging Face Hub",
                source=f"hf://{source.location}/{file}@{commit}",
                revision=commit,
            )
        case "random":
            raise RecipeError("random weights have no file", hint="--weights PATH")
    if source.sha256 and source.kind != "url" and fetched.path.is_file():
        _require_sha256(fetched, source.sha256)
    return fetched


def is_here(source: Source) -> bool:
    """Whether ``fetch`` would find everything on this machine, without asking a server."""
    match source.kind:
        case "url":
            from deploy.models.download import is_downloaded

            return is_downloaded(source.location, file_name(source.location), source.sha256)
        case "hub":
            from deploy.models.hub import is_cached

            return is_cached(source.location, source.file, source.revision)
        case _:
            return True


def local_file(place: Path | str, console: Console | None = None) -> Path:
    """Return the path of a checkpoint that is named as ``--weights`` takes it, downloading it where it is not here.

    Raises:
        RecipeError: it is none of the forms, or random weights, which have no file.
        CheckpointError, DownloadError, StorageError: as ``fetch``.
    """
    return checkpoint_file(place) if isinstance(place, Path) else fetch(parse_source(place), console).path


def checkpoint_file(place: Path) -> Path:
    """Return the checkpoint that a path names: of a folder, such as ``save_pretrained`` writes, the one inside.

    Raises:
        CheckpointError: a folder without a checkpoint, or with several.
    """
    if not place.is_dir():
        return place
    return place / choose_file(str(place), [found.name for found in place.iterdir() if found.is_file()])


def choose_file(where: str, names: Sequence[str]) -> str:
    """Choose the file with the weights: ``model.safetensors``, or the only one of a checkpoint's type.

    Raises:
        CheckpointError: there is none, or it cannot be told which; lists them.
    """
    found = [
        n for n in sorted(names) if n.endswith(SUFFIXES) and not _NO_WEIGHTS.match(PurePosixPath(n).name)
    ]  # fmt: skip
    if _USUAL in found:
        return _USUAL
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(
            f"{where} holds no checkpoint ({', '.join(SUFFIXES)}) among its {len(names)} files",
            hint="another repository or folder, or the file itself: --weights PATH",
        )
    more = f"\n  ... and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    listing = "".join(f"\n  {name}" for name in found[:_SHOWN])
    raise CheckpointError(
        f"{where} holds {len(found)} checkpoints; name one:{listing}{more}",
        hint=f"--weights {where}/{found[0]}",
    )


def _fetch_url(source: Source, console: Console) -> Fetched:
    from deploy.models.download import download

    name = file_name(source.location)
    path, sha256 = download(source.location, name, source.sha256, console)
    pinned = f"{source.location}#sha256={sha256}"
    if not source.sha256:
        console.warn(
            f"nothing pins these weights; to get the same file every time: --weights '{pinned}' "
            f"(until then the copy in the cache is taken: {path})"
        )
    note = "" if source.sha256 else ", not pinned"
    return Fetched(path=path, name=f"{name} from {urlsplit(source.location).hostname}{note}", source=pinned)


def _require_sha256(fetched: Fetched, pinned: str) -> None:
    if not (got := sha256_of(fetched.path)).startswith(pinned):
        raise DownloadError(
            f"{fetched.name}: its sha256 is {got}, expected {pinned}{'' if len(pinned) == 64 else '...'}",
            hint="it is another file than the one that was pinned; if it is the right one, correct #sha256=",
        )


def file_name(url: str) -> str:
    """Return the last part of a URL's path, made safe as a file name."""
    last = unquote(urlsplit(url).path.rpartition("/")[2])
    return re.sub(r"[^\w.\-+=]", "_", last)[-120:]


def _seed(text: str) -> int:
    seed = text.partition(":")[2] or "0"
    if not (seed.isascii() and seed.isdigit()) or text == "random:":
        raise RecipeError(f"weights: got {text!r}, expected random or random:SEED", hint="--weights random:1")
    return int(seed)


def _split_pin(text: str) -> tuple[str, str]:
    match = _PIN.search(text)
    if match is None:
        return text, ""
    digits = match[1].lower()
    if not re.fullmatch(r"[0-9a-f]{8,64}", digits):
        raise RecipeError(
            f"weights: got #sha256={match[1]}, expected 64 hexadecimal digits, or the first 8 or more of them",
            hint="sha256sum FILE prints them",
        )
    return text[: match.start()], digits


def _parse_hub(body: str) -> Source:
    place, at, revision = body[len("hf://") :].rpartition("@")
    place = place if at else revision
    owner, _, rest = place.partition("/")
    repo, _, file = rest.partition("/")
    parts = (owner, repo, *(file.split("/") if file else ()))
    if not repo or any(p in ("", ".", "..") for p in parts) or (at and not revision):
        raise RecipeError(
            f"weights: got {body!r}, expected hf://OWNER/REPO[/FILE][@REVISION]",
            hint="--weights hf://timm/resnet18.a1_in1k",
        )
    return Source(kind="hub", location=f"{owner}/{repo}", file=file, revision=revision if at else "")


def _parse_url(body: str, sha256: str) -> Source:
    try:
        parts = urlsplit(body)
        broken = not parts.hostname or parts.port == 0 or bool(re.search(r"\s", body)) or not body.isascii()
    except ValueError:
        broken = True
    if broken:
        raise RecipeError(f"weights: {body!r} is not a URL", hint="https://HOST/FILE, spaces as %20")
    if parts.username is not None:
        raise RecipeError(
            f"weights: a URL with a password on {parts.hostname} would end up in the bundle",
            hint="download it yourself, then --weights PATH",
        )
    if Path(file_name(body)).suffix not in SUFFIXES:
        raise RecipeError(
            f"weights: {body} does not end in the name of a checkpoint ({', '.join(SUFFIXES)})",
            hint="download it yourself under its name, then --weights PATH",
        )
    if parts.scheme.lower() == "http" and len(sha256) < 64:
        raise RecipeError(
            f"weights: {body} can be changed on its way, and nothing pins it",
            hint="https://, or the whole hash: --weights '" + body + "#sha256=<64 digits>'",
        )
    return Source(kind="url", location=body.partition("#")[0], sha256=sha256)
