"""What TensorRT and TensorRT-RTX are told to build: one mapping from options to builder settings, and its record.

Only names that 10.12 to 11.4 share are used, on the bindings' own objects (``trt`` is whichever module is at hand);
``tests/contracts/test_tensorrt_api.py`` holds them against both surfaces. No precision flag is among them: 11 has none,
and on both the types of the ONNX file decide.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from deploy import units
from deploy.backends.base import BuildOptions, Progress
from deploy.errors import EngineBuildError
from deploy.records import Batch

HARDWARE = ("none", "ampere_plus", "same_compute_capability")


def configure(trt: Any, config: Any, options: BuildOptions) -> None:
    """Write the options into a builder configuration; everything that has a default in the runtime is stated.

    Args:
        trt: The module of the bindings, ``tensorrt`` or ``tensorrt_rtx``.
        config: A new ``IBuilderConfig``.
        options: What was asked.
    """
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it the audit sees no names and types
    config.builder_optimization_level = options.level
    if options.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.tf32:  # on by default in TensorRT, off in polygraphy
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.strip:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        if not options.refit:  # only the weights that it was built with: costs no speed
            config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    levels = {
        "ampere_plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
        "same_compute_capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
    }
    if options.hardware in levels:
        config.hardware_compatibility_level = levels[options.hardware]


def add_profiles(builder: Any, config: Any, network: Any, ranges: tuple[Batch, ...]) -> None:
    """Give every dynamic input its ranges; -1 stands for the batch axis, the only one that is ever dynamic.

    Raises:
        EngineBuildError: a fixed graph was asked for several batch sizes.
    """
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    dynamic = [tensor for tensor in inputs if -1 in tuple(tensor.shape)]
    if not dynamic:
        _require_fixed(inputs, ranges)
        return
    for batch in ranges:
        profile = builder.create_optimization_profile()
        for tensor in dynamic:
            shapes = [tuple(size if n == -1 else n for n in tensor.shape) for size in (batch.min, batch.opt, batch.max)]
            profile.set_shape(tensor.name, *shapes)
        config.add_optimization_profile(profile)


def _require_fixed(inputs: list[Any], ranges: tuple[Batch, ...]) -> None:
    if len(ranges) > 1 or any(batch.dynamic for batch in ranges):
        shapes = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in inputs)
        raise EngineBuildError(
            f"asked for the batch sizes {ranges_text(ranges)}, but the graph is fixed: {shapes}",
            hint="export with --batch min:opt:max, or leave --batch out here",
        )


def monitor(trt: Any, progress: Progress | None, cancelled: Callable[[], bool]) -> Any:
    """Make a progress monitor: it reports the phases of a build, which nest, and ends a build that is cancelled.

    Nothing may leave its methods: they are called from C++.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, int] = {}  # name -> steps, of the phases that are open

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = num_steps
            self._tell(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            # The last step is reported by the end of its phase, so that a phase ends once.
            if step + 1 < (steps := self.phases.get(phase_name, 0)):
                self._tell(phase_name, step + 1, steps)
            return not cancelled()

        def phase_finish(self, phase_name: str) -> None:
            steps = self.phases.pop(phase_name, 0)
            self._tell(phase_name, steps, steps)

        def _tell(self, phase: str, done: int, steps: int) -> None:
            if progress and steps:
                with contextlib.suppress(Exception):  # a closed terminal must not end the process inside C++
                    progress(phase, done, steps)

    return Monitor()


def ranges_text(ranges: tuple[Batch, ...]) -> str:
    """Write profiles as they are typed: ``"1,1:8:32"``."""
    return ",".join(str(batch) for batch in ranges)


def ranges_of(options: Mapping[str, str]) -> tuple[Batch, ...]:
    """Read the profiles back from an engine's record."""
    return tuple(Batch.parse(text) for text in options["batch"].split(","))


def choose_profile(ranges: tuple[Batch, ...], size: int) -> int:
    """Return the index of the profile to run a batch with: of those that take it, tuned nearest, then narrowest.

    A size that no profile takes gets profile 0, whose refusal names the range.
    """
    fitting = [i for i, batch in enumerate(ranges) if batch.min <= size <= batch.max]
    order = {i: (abs(ranges[i].opt - size), ranges[i].max - ranges[i].min, i) for i in fitting}
    return min(fitting, key=lambda i: order[i], default=0)


def described(options: BuildOptions) -> dict[str, str]:
    """Return what was asked as an engine's record keeps it, the same words for both runtimes."""
    return {
        "strongly_typed": "yes",
        "batch": ranges_text(options.ranges),
        "tf32": str(options.tf32),
        "level": str(options.level),
        "workspace": units.binary(options.workspace) if options.workspace else "no limit",
        "version_compatible": _yes(options.version_compatible),
        "hardware": options.hardware,
        "refit": "yes" if options.refit else "identical weights only" if options.strip else "no",
        "strip": _yes(options.strip),
    }


def _yes(value: bool) -> str:
    return "yes" if value else "no"
