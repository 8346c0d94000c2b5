"""What the GPU says of itself while it is measured: clock, power, temperature, and why it runs slower than it could."""

from __future__ import annotations

from functools import cache
from typing import Any

REASONS = {  # NVML's clock event reasons that are no choice of the user
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}


def state(index: int = 0) -> dict[str, Any]:
    """{"sm_mhz", "watts", "celsius", "throttled": reasons} of a GPU now; {"nvml": why not} where it cannot be asked."""
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
    except Exception as error:  # NVML's own errors, by driver and permission
        return {"nvml": f"{type(error).__name__}: {error}"[:200]}


@cache
def _handle(index: int) -> tuple[Any, Any]:
    import pynvml  # type: ignore[import-not-found]

    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)
