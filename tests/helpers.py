"""Numbers that every room's tests draw. What only one room needs is beside it, in helpers_<room>.py."""
import torch


def seeded(seed: int = 0) -> torch.Generator:
    """A generator that depends on the seed alone."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Standard normal numbers that depend on shape and seed alone."""
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)
