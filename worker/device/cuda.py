"""NVIDIA GPUs through cuda-bindings: the CUDA driver and NVRTC, with the same kernels as AMD GPUs.

Source: CUDA Driver API and NVRTC documentation (https://docs.nvidia.com/cuda).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from cuda.bindings import driver, nvrtc

from redshard.worker.device.base import DeviceError, DeviceProperties
from redshard.worker.device.gpu import Direction, Driver, GpuDevice
from redshard.worker.device.kernel_set import Launch

_HINTS = {
    "CUDA_ERROR_OUT_OF_MEMORY": "use a shorter context, a smaller cache or more GPUs",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the driver does not know this image; update the NVIDIA driver",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "nothing more can run in this process; look for Xid messages in dmesg",
    "CUDA_ERROR_LAUNCH_FAILED": "nothing more can run in this process; look for Xid messages in dmesg",
}

_IPC_HANDLE_BYTES = 64


def cuda_device_count() -> int:
    """GPUs that the CUDA driver offers this process.

    Raises:
        DeviceError: there is no CUDA driver, or it cannot start.
    """
    try:
        (error,) = driver.cuInit(0)
        if not error.value:
            error, count = driver.cuDeviceGetCount()
    except RuntimeError as reason:
        raise DeviceError(f"no CUDA driver: {reason}") from None
    if error == driver.CUresult.CUDA_ERROR_NO_DEVICE:
        return 0
    if error.value:
        raise DeviceError(f"the CUDA driver does not start: {error.name} ({error.value})")
    return int(count)


class CudaDevice(GpuDevice):
    """One NVIDIA GPU, of compute capability 8.0 or newer.

    Args:
        ordinal: its number among those that the driver offers this process.

    Raises:
        DeviceError: there is no CUDA driver or no such GPU.
    """

    def __init__(self, ordinal: int = 0) -> None:
        count = cuda_device_count()
        if not 0 <= ordinal < count:
            raise DeviceError(f"there is no CUDA device number {ordinal}: the driver reports {count}")
        super().__init__(CudaDriver(ordinal))


def _overlapping() -> driver.CUlaunchAttribute:
    """Programmatic dependent launch: see `Launch.overlaps`."""
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


class CudaDriver(Driver):
    """CUDA driver calls for one GPU, in its primary context."""

    kind = "cuda"
    hints = _HINTS

    def __init__(self, ordinal: int) -> None:
        super().__init__()
        self.name = f"GPU {ordinal}"
        self._context: Any = None
        self._device = self.call(driver.cuDeviceGet, ordinal)
        self._context = self.call(driver.cuDevicePrimaryCtxRetain, self._device)
        self.make_current()
        attribute = driver.CUdevice_attribute
        major = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        minor = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        self.properties = DeviceProperties(
            name=self.call(driver.cuDeviceGetName, 256, self._device).partition(b"\0")[0].decode(),
            arch=f"sm_{major}{minor}",
            compute_units=self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
            wave_size=self._attribute(attribute.CU_DEVICE_ATTRIBUTE_WARP_SIZE),
            lds_bytes=self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK),
            total_memory=self.call(driver.cuDeviceTotalMem, self._device),
            features=frozenset({"mma"}),
        )
        self.name = f"GPU {ordinal} ({self.properties.name}, {self.properties.arch})"
        self._can_overlap = major >= 9
        self._stream = self.call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)
        compiler = self.call(nvrtc.nvrtcVersion)
        self.target = f"cuda {self.properties.arch} nvrtc {compiler}"

    def versions(self) -> dict[str, str]:
        number = self.call(driver.cuDriverGetVersion)  # major * 1000 + minor * 10
        major, minor = self.call(nvrtc.nvrtcVersion)
        return {"CUDA driver": f"{number // 1000}.{number % 1000 // 10}", "NVRTC": f"{major}.{minor}"}

    def make_current(self) -> None:
        if self._context is not None:
            self.call(driver.cuCtxSetCurrent, self._context)

    def memory_info(self) -> tuple[int, int]:
        free, total = self.call(driver.cuMemGetInfo)
        return free, total

    def allocate(self, nbytes: int) -> int:
        return int(self.call(driver.cuMemAlloc, nbytes, what=f"{nbytes} bytes"))

    def free(self, address: int) -> None:
        self.call(driver.cuMemFree, address, what=f"{address:#x}")

    def allocate_host(self, nbytes: int) -> int:
        return int(self.call(driver.cuMemHostAlloc, nbytes, 0, what=f"{nbytes} bytes"))

    def free_host(self, address: int) -> None:
        self.call(driver.cuMemFreeHost, address, what=f"{address:#x}")

    def copy(self, destination: int, source: int, nbytes: int, direction: Direction) -> None:
        what = f"{nbytes} bytes {direction}, {source:#x} to {destination:#x}"
        self.call(driver.cuMemcpyAsync, destination, source, nbytes, self._stream, what=what)

    def fill(self, destination: int, byte: int, nbytes: int) -> None:
        what = f"{nbytes} bytes at {destination:#x}"
        self.call(driver.cuMemsetD8Async, destination, byte, nbytes, self._stream, what=what)

    def create_event(self) -> Any:
        return self.call(driver.cuEventCreate, driver.CUevent_flags.CU_EVENT_DISABLE_TIMING.value)

    def record_event(self, event: Any) -> None:
        self.call(driver.cuEventRecord, event, self._stream)

    def wait_event(self, event: Any) -> None:
        self.call(driver.cuEventSynchronize, event)

    def destroy_event(self, event: Any) -> None:
        self.call(driver.cuEventDestroy, event)

    def synchronize(self) -> None:
        self.call(driver.cuStreamSynchronize, self._stream)

    def begin_capture(self) -> None:
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.call(driver.cuStreamBeginCapture, self._stream, mode)

    def end_capture(self) -> Any:
        graph = self.call(driver.cuStreamEndCapture, self._stream)
        try:
            return self.call(driver.cuGraphInstantiate, graph, 0)
        finally:
            self.call(driver.cuGraphDestroy, graph)

    def replay(self, graph: Any) -> None:
        self.call(driver.cuGraphLaunch, graph, self._stream)

    def destroy_graph(self, graph: Any) -> None:
        self.call(driver.cuGraphExecDestroy, graph)

    def compile(self, source: Path, options: list[str]) -> bytes:
        options = [
            f"--gpu-architecture={self.properties.arch}",
            "--device-as-default-execution-space",
            *options,
        ]
        program = self.call(
            nvrtc.nvrtcCreateProgram, source.read_bytes(), source.name.encode(), 0, None, None
        )
        try:
            encoded = [option.encode() for option in options]
            (result,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
            if result.value:
                raise DeviceError(
                    f"{source.name} does not compile for {self.name} with {' '.join(options)}: "
                    f"{result.name}\n{self._compiler_log(program)}"
                )
            image = bytes(self.call(nvrtc.nvrtcGetCUBINSize, program))
            self.call(nvrtc.nvrtcGetCUBIN, program, image)
            return image
        finally:
            self.call(nvrtc.nvrtcDestroyProgram, program)

    def load(self, image: bytes) -> Any:
        return self.call(driver.cuModuleLoadData, image, what=f"image of {len(image)} bytes")

    def function(self, module: Any, name: str) -> Any:
        return self.call(driver.cuModuleGetFunction, module, name.encode(), what=name)

    def launch(self, function: Any, launch: Launch, parameters: Any) -> None:
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
        config.hStream = self._stream
        if launch.overlaps and self._can_overlap:
            config.attrs, config.numAttrs = [_overlapping()], 1
        what = f"{launch.kernel}, {launch.grid} workgroups of {launch.threads}"
        self.call(driver.cuLaunchKernelEx, config, function, ctypes.addressof(parameters), 0, what=what)

    def share(self, address: int) -> bytes:
        handle = self.call(driver.cuIpcGetMemHandle, address, what=f"{address:#x}")
        return ctypes.string_at(handle.getPtr(), _IPC_HANDLE_BYTES)

    def open_shared(self, handle: bytes) -> int:
        own = driver.CUipcMemHandle()
        ctypes.memmove(own.getPtr(), handle, _IPC_HANDLE_BYTES)
        flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
        return int(self.call(driver.cuIpcOpenMemHandle, own, flags))

    def close_shared(self, address: int) -> None:
        self.call(driver.cuIpcCloseMemHandle, address, what=f"{address:#x}")

    def can_access(self, ordinal: int) -> bool:
        other = self.call(driver.cuDeviceGet, ordinal)
        return bool(self.call(driver.cuDeviceCanAccessPeer, self._device, other, what=f"GPU {ordinal}"))

    def close(self) -> None:
        self.call(driver.cuStreamDestroy, self._stream)

    def _attribute(self, attribute: Any) -> int:
        return int(self.call(driver.cuDeviceGetAttribute, attribute, self._device))

    def _compiler_log(self, program: Any) -> str:
        log = bytes(self.call(nvrtc.nvrtcGetProgramLogSize, program))
        self.call(nvrtc.nvrtcGetProgramLog, program, log)
        return log.rstrip(b"\0").decode(errors="replace")
