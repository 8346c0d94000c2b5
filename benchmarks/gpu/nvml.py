"""The state of a GPU during a measurement, from NVML: clock, power, temperature, and reasons for throttling."""

from __future__ import annotations

from functools import cache
from typing import Any

REASONS = {  # NVML's clock event reasons, except those that the user sets
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}


def state(index: int = 0) -> dict[str, Any]:
    """{"sm_mhz", "watts", "celsius", "throttled": reasons} of a GPU, or {"nvml": error} if NVML is not available."""
    try:
        nvml, handle = _handle(index)
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return {
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "celsius": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "throttled": [name for bit, name in REASONS.items() if bits & bit],
        }
    except ImportError:
        return {"nvml": "nvidia-ml-py is not installed"}
    except Exception as error:  # NVML errors depend on driver and permissions
        return {"nvml": f"{type(error).__name__}: {error}"[:200]}


@cache
def _handle(index: int) -> tuple[Any, Any]:
    import pynvml  # type: ignore[import-not-found]

    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)
