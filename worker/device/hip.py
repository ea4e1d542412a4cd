"""AMD GPUs through the HIP runtime: hip-python, which looks libamdhip64 and libhiprtc up when first called.

Sources: HIP runtime API reference and hipRTC documentation (https://rocm.docs.amd.com/projects/HIP).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from hip import hip, hiprtc

from redshard.worker.device.base import DeviceError, DeviceProperties
from redshard.worker.device.gpu import Direction, Driver, GpuDevice
from redshard.worker.device.kernel_set import Launch

_HINTS = {
    "hipErrorOutOfMemory": "use a shorter context, a smaller cache or more GPUs",
    "hipErrorNoBinaryForGpu": "the HIP runtime does not know this GPU; install a newer ROCm",
    "hipErrorIllegalAddress": "nothing more can run in this process; look for page faults in dmesg",
    "hipErrorLaunchFailure": "nothing more can run in this process; look for amdgpu messages in dmesg",
    "hipErrorNoDevice": "the GPU is gone; look for resets in dmesg",
}

_IPC_HANDLE_BYTES = 64
_COMPUTE_UNITS = hip.hipDeviceAttribute_t.hipDeviceAttributePhysicalMultiProcessorCount
_DIRECTIONS = {
    "in": hip.hipMemcpyKind.hipMemcpyHostToDevice,
    "out": hip.hipMemcpyKind.hipMemcpyDeviceToHost,
    "within": hip.hipMemcpyKind.hipMemcpyDeviceToDevice,
}


def hip_device_count() -> int:
    """GPUs that the HIP runtime offers this process.

    Raises:
        DeviceError: there is no HIP runtime, or it cannot start.
    """
    try:
        error, count = hip.hipGetDeviceCount()
    except RuntimeError as reason:
        plain = str(reason).replace("b'", "").replace("'", "")  # it quotes Python's bytes
        raise DeviceError(f"no HIP runtime: {plain}") from None
    if error == hip.hipError_t.hipErrorNoDevice:
        return 0
    if error != hip.hipError_t.hipSuccess:
        raise DeviceError(f"hipGetDeviceCount: {error.name} ({error.value})")
    return int(count)


class HipDevice(GpuDevice):
    """One AMD GPU.

    Args:
        ordinal: its number among those that the HIP runtime offers this process.

    Raises:
        DeviceError: there is no HIP runtime or no such GPU.
    """

    def __init__(self, ordinal: int = 0) -> None:
        count = hip_device_count()
        if not 0 <= ordinal < count:
            raise DeviceError(f"there is no HIP device number {ordinal}: the runtime reports {count}")
        super().__init__(HipDriver(ordinal))


class HipDriver(Driver):
    """HIP calls for one GPU."""

    kind = "hip"
    hints = _HINTS

    def __init__(self, ordinal: int) -> None:
        super().__init__()
        self._ordinal = ordinal
        self.name = f"GPU {ordinal}"
        self._images: list[bytes] = []
        properties = self.call(hip.hipGetDeviceProperties, ordinal)
        self._architecture = properties.gcnArchName
        self.properties = DeviceProperties(
            name=properties.name,
            arch=self._architecture.split(":")[0],
            # On RDNA multiProcessorCount counts pairs of them.
            compute_units=self.call(hip.hipDeviceGetAttribute, _COMPUTE_UNITS, ordinal),
            wave_size=properties.warpSize,
            lds_bytes=properties.sharedMemPerBlock,
            total_memory=properties.totalGlobalMem,
            features=_features(self._architecture),
        )
        self.name = f"GPU {ordinal} ({self.properties.name}, {self.properties.arch})"
        self._stream = self.call(hip.hipStreamCreateWithFlags, hip.hipStreamNonBlocking)
        compiler = self.call(hiprtc.hiprtcVersion)
        runtime = self.call(hip.hipRuntimeGetVersion)
        self.target = f"hip {self._architecture} runtime {runtime} hiprtc {compiler}"

    def versions(self) -> dict[str, str]:
        runtime, driver = self.call(hip.hipRuntimeGetVersion), self.call(hip.hipDriverGetVersion)
        major, minor = self.call(hiprtc.hiprtcVersion)
        return {
            "HIP runtime": _version(runtime),
            "HIP driver": _version(driver),
            "hiprtc": f"{major}.{minor}",
        }

    def make_current(self) -> None:
        self.call(hip.hipSetDevice, self._ordinal)

    def forget_error(self) -> None:
        hip.hipGetLastError()

    def memory_info(self) -> tuple[int, int]:
        free, total = self.call(hip.hipMemGetInfo)
        return free, total

    def allocate(self, nbytes: int) -> int:
        return int(self.call(hip.hipMalloc, nbytes, what=f"{nbytes} bytes"))

    def free(self, address: int) -> None:
        self.call(hip.hipFree, address, what=f"{address:#x}")

    def allocate_host(self, nbytes: int) -> int:
        return int(self.call(hip.hipHostMalloc, nbytes, hip.hipHostMallocDefault, what=f"{nbytes} bytes"))

    def free_host(self, address: int) -> None:
        self.call(hip.hipHostFree, address, what=f"{address:#x}")

    def copy(self, destination: int, source: int, nbytes: int, direction: Direction) -> None:
        what = f"{nbytes} bytes {direction}, {source:#x} to {destination:#x}"
        self.call(
            hip.hipMemcpyAsync, destination, source, nbytes, _DIRECTIONS[direction], self._stream, what=what
        )

    def fill(self, destination: int, byte: int, nbytes: int) -> None:
        what = f"{nbytes} bytes at {destination:#x}"
        self.call(hip.hipMemsetAsync, destination, byte, nbytes, self._stream, what=what)

    def create_event(self) -> Any:
        return self.call(hip.hipEventCreateWithFlags, hip.hipEventDisableTiming)

    def record_event(self, event: Any) -> None:
        self.call(hip.hipEventRecord, event, self._stream)

    def wait_event(self, event: Any) -> None:
        self.call(hip.hipEventSynchronize, event)

    def destroy_event(self, event: Any) -> None:
        self.call(hip.hipEventDestroy, event)

    def synchronize(self) -> None:
        self.call(hip.hipStreamSynchronize, self._stream)

    def begin_capture(self) -> None:
        mode = hip.hipStreamCaptureMode.hipStreamCaptureModeThreadLocal
        self.call(hip.hipStreamBeginCapture, self._stream, mode)

    def end_capture(self) -> Any:
        graph = self.call(hip.hipStreamEndCapture, self._stream)
        try:
            return self.call(hip.hipGraphInstantiateWithFlags, graph, 0)
        finally:
            self.call(hip.hipGraphDestroy, graph)

    def replay(self, graph: Any) -> None:
        self.call(hip.hipGraphLaunch, graph, self._stream)

    def destroy_graph(self, graph: Any) -> None:
        self.call(hip.hipGraphExecDestroy, graph)

    def compile(self, source: Path, options: list[str]) -> bytes:
        options = [f"--offload-arch={self._architecture}", "-O3", *options]
        program = self.call(
            hiprtc.hiprtcCreateProgram, source.read_bytes(), source.name.encode(), 0, None, None
        )
        try:
            encoded = [option.encode() for option in options]
            result, *_ = hiprtc.hiprtcCompileProgram(program, len(encoded), encoded)
            if result != hiprtc.hiprtcResult.HIPRTC_SUCCESS:
                raise DeviceError(
                    f"{source.name} does not compile for {self.name} with {' '.join(options)}: "
                    f"{result.name}\n{self._compiler_log(program)}"
                )
            image = bytearray(self.call(hiprtc.hiprtcGetCodeSize, program))
            self.call(hiprtc.hiprtcGetCode, program, image)
            return bytes(image)
        finally:
            self.call(hiprtc.hiprtcDestroyProgram, program.createRef())

    def load(self, image: bytes) -> Any:
        self._images.append(image)  # runtimes may read it as long as the module is used
        return self.call(hip.hipModuleLoadData, image, what=f"image of {len(image)} bytes")

    def function(self, module: Any, name: str) -> Any:
        return self.call(hip.hipModuleGetFunction, module, name.encode(), what=name)

    def launch(self, function: Any, launch: Launch, parameters: Any) -> None:
        self.call(
            hip.hipModuleLaunchKernel,
            function,
            *launch.grid,
            launch.threads,
            1,
            1,
            0,
            self._stream,
            parameters,
            None,
            what=f"{launch.kernel}, {launch.grid} workgroups of {launch.threads}",
        )

    def share(self, address: int) -> bytes:
        handle = self.call(hip.hipIpcGetMemHandle, address, what=f"{address:#x}")
        return ctypes.string_at(int(handle), _IPC_HANDLE_BYTES)  # its attribute ends at the first zero

    def open_shared(self, handle: bytes) -> int:
        own = hip.hipIpcMemHandle_st.fromObj(bytearray(handle))
        return int(self.call(hip.hipIpcOpenMemHandle, own, hip.hipIpcMemLazyEnablePeerAccess))

    def close_shared(self, address: int) -> None:
        self.call(hip.hipIpcCloseMemHandle, address, what=f"{address:#x}")

    def can_access(self, ordinal: int) -> bool:
        return bool(self.call(hip.hipDeviceCanAccessPeer, self._ordinal, ordinal, what=f"GPU {ordinal}"))

    def close(self) -> None:
        self.call(hip.hipStreamDestroy, self._stream)

    def _compiler_log(self, program: Any) -> str:
        log = bytearray(self.call(hiprtc.hiprtcGetProgramLogSize, program))
        self.call(hiprtc.hiprtcGetProgramLog, program, log)
        return log.rstrip(b"\0").decode(errors="replace")


def _version(number: int) -> str:
    """HIP counts major * 10,000,000 + minor * 100,000 + patch."""
    return f"{number // 10_000_000}.{number // 100_000 % 100}.{number % 100_000}"


def _features(architecture: str) -> frozenset[str]:
    """The matrix unit that kernels/hip/prelude_amd.h uses, if any."""
    if architecture.startswith(("gfx11", "gfx12")):
        return frozenset({"wmma"})
    if architecture.startswith(("gfx908", "gfx90a", "gfx94", "gfx95")):
        return frozenset({"mfma"})
    return frozenset()
