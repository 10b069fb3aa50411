"""The ways to parametrize a model's projections, by the name a person types."""

from sltrain.methods import full, low_rank, sltrain
from sltrain.methods.settings import Method

METHODS: dict[str, Method] = {"full": full, "low_rank": low_rank, "sltrain": sltrain}
