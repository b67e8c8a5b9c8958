"""What a training takes: operations, device hours, money, energy and carbon, under stated assumptions."""

from __future__ import annotations

from dataclasses import dataclass

CAR = 57_153.0  # kg of CO2e of a car over its life, fuel included: 126,000 lbs (Strubell et al. 2019, arXiv 1906.02243)


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        flops: Peak of dense products in 16 bits, operations a second (datasheet).
        watts: Power limit (datasheet).
    """

    flops: float
    watts: float


DEVICES = {
    "V100": Device(125e12, 300),
    "A100": Device(312e12, 400),
    "H100": Device(989e12, 700),
    "H800": Device(989e12, 700),
}


def operations(parameters: float, tokens: float) -> float:
    """Return the operations of a training, 6 · N · D: two a weight and token, three times with the backward pass.

    Args:
        parameters: That a token uses.
        tokens: Of the training.
    """
    return 6.0 * parameters * tokens


def device_hours(total: float, device: Device, utilisation: float) -> float:
    """Return the hours that a number of operations takes on one device.

    Raises:
        ValueError: A utilisation outside of 0 to 1.
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation must be above 0 and at most 1, got {utilisation}")
    return total / (device.flops * utilisation) / 3600


def implied_utilisation(total: float, device: Device, hours: float) -> float:
    """Return the share of the peak at which a training of so many device hours did its operations."""
    return total / (device.flops * hours * 3600)


def cost(hours: float, price: float) -> float:
    """Return the price of device hours.

    Raises:
        ValueError: A price of zero or below.
    """
    if not price > 0:
        raise ValueError(f"the price of an hour must be above 0, got {price}")
    return hours * price


def energy(hours: float, device: Device, overhead: float) -> float:
    """Return the energy in kWh: every device at its limit, times what the building needs for each unit of it (PUE).

    Raises:
        ValueError: An overhead below 1.
    """
    if not overhead >= 1:
        raise ValueError(f"overhead must be at least 1, the devices' own energy, got {overhead}")
    return hours * device.watts / 1000 * overhead


def updates(tokens: float, batch: float) -> float:
    """Return how often an optimizer changes each parameter.

    Raises:
        ValueError: A batch of no tokens.
    """
    if not batch > 0:
        raise ValueError(f"a batch needs more than 0 tokens, got {batch}")
    return tokens / batch
