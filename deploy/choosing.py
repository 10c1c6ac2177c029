"""The functions of ``deploy.api`` that look for something: a schedule, the source of an error, what an engine chose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deploy.keywords import Assignments, PathLike, Size, console_or_silence, path_of, recipe_of

if TYPE_CHECKING:
    from deploy.answers import BisectRecord, ShowRecord, TuneRecord
    from deploy.console import Console


def tune(
    system: PathLike,
    *,
    target_speedup: float | None = None,
    max_drift: float | None = None,
    variant: str | None = None,
    weights: PathLike | None = None,
    size: Size | None = None,
    batch: int | str | None = None,
    backend: str | None = None,
    images: PathLike | None = None,
    seconds: float | None = None,
    threads: int | None = None,
    set_: Assignments = (),
    out: PathLike | None = None,
    console: Console | None = None,
) -> TuneRecord:
    """Search schedules on this machine and write the chosen one as a recipe: ``effdeploy tune``.

    Args:
        system: A system whose network takes a schedule (see ``systems``), or a recipe file (``*.yaml``).
        target_speedup: At least so many times as fast as without a schedule; then the least drift is chosen.
        max_drift: At most this relative L2 distance of the outputs; without ``target_speedup`` the fastest is chosen.
        variant: As for ``export``, like ``weights``, ``size``, ``batch``, ``backend`` and ``set_``.
        weights: See ``variant``.
        size: See ``variant``.
        batch: See ``variant``; the optimum of a range is timed.
        backend: See ``variant``.
        images: Folder of photos over which drift is measured; drawn images otherwise.
        seconds: Measure at least this long per candidate.
        threads: CPU threads of every candidate while measuring.
        set_: See ``variant``.
        out: The recipe file; the plot lies beside it. Default: ``<system>-<variant>-tuned.yaml`` in the current folder.
        console: Where progress goes; nowhere when left out.

    Returns:
        Every schedule that was timed, what layers took, and the chosen schedule.

    Raises:
        RecipeError: Neither goal was given, or a value that cannot be.
        UnknownNameError: The system has no schedule.
        TuningError: No schedule does what was asked.
    """
    from deploy.tuning import Goal, tune_recipe

    goal = Goal(speedup=target_speedup, drift=max_drift)
    recipe = recipe_of(
        system, variant=variant, weights=weights, size=size, batch=batch, precision=None, backend=backend, target=None,
        sm=None, device=None, images=images, calib=None, calib_method=None, baseline=None, seconds=seconds,
        threads=threads, set_=set_, verify_each=False,
    )  # fmt: skip
    path = path_of(out) or Path(f"{recipe.system}-{recipe.variant}-tuned.yaml")
    return tune_recipe(recipe, goal, path, console_or_silence(console))


def bisect(
    bundle: PathLike,
    *,
    images: PathLike | None = None,
    backend: str | None = None,
    out: PathLike | None = None,
    console: Console | None = None,
) -> BisectRecord:
    """Find where the error of a reduced-precision bundle comes from: ``effdeploy bisect``.

    Args:
        bundle: Bundle folder, in FP16, BF16, INT8 or FP8; one that failed parity as well.
        images: Folder of photos; default: those of the bundle's recipe, else generated ones.
        backend: What runs the graphs; default: ONNX Runtime's CPU provider.
        out: The plot, SVG; default: named after the bundle, in the current folder.
        console: Where progress goes; nowhere when left out.

    Returns:
        Errors by stage, along the network and by module, and the first module whose error jumps.

    Raises:
        BundleError: The bundle is in FP32, or a file was changed.
        PrecisionError: The nodes of its files cannot be told apart.
        BackendUnavailableError: The backend cannot run here.
    """
    from deploy.bisecting import bisect_bundle

    return bisect_bundle(
        Path(bundle), console_or_silence(console), images=path_of(images), backend=backend, out=path_of(out)
    )


def show(
    bundle: PathLike,
    photo: PathLike,
    *,
    out: PathLike | None = None,
    weights: PathLike | None = None,
    console: Console | None = None,
) -> ShowRecord:
    """Draw what a bundle's engine did with a photo, beside PyTorch: ``effdeploy show``.

    Args:
        bundle: Bundle folder.
        photo: Image file.
        out: PNG file; default: named after photo and bundle, in the current folder.
        weights: As for ``verify``.
        console: Where progress goes; nowhere when left out.

    Returns:
        What was drawn, with how far both runs agree.

    Raises:
        UnknownNameError: The system has nothing to draw.
        BundleError: The engine does not give the outputs that are drawn, or a file was changed.
        ImageError: The photo cannot be read.
    """
    from deploy.showing import show_photo

    return show_photo(Path(bundle), Path(photo), console_or_silence(console), out=path_of(out), weights=weights)
