"""Keys and values of rows that come and go while others stay."""

import torch
from transformers.cache_utils import Cache


class SeatCache(Cache):
    """
    Keys and values of rows of different lengths, each in a seat of its own. Column `c` of a seat is position `c` of
    its row, so that a row comes, grows and goes without the others being moved. The first seats are those in use.
    """

    def resize(self, seats: int, columns: int, in_use: int) -> None:
        """Makes it `seats` seats of `columns` tokens; those in use are kept."""
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)  # [seats, heads, columns, head_dim]
                # Zeros, since what is masked must be finite all the same.
                new = old.new_zeros(seats, old.shape[1], columns, old.shape[3])
                new[:in_use, :, : old.shape[2]] = old[:in_use, :, :columns]
                setattr(layer, name, new)

    def fill(self, first: int, cache: Cache) -> None:
        """Copies the rows of `cache` into the seats from `first` on."""
        for layer, source in zip(self.layers, cache.layers, strict=True):
            rows, _, columns, _ = source.keys.shape
            layer.keys[first : first + rows, :, :columns] = source.keys
            layer.values[first : first + rows, :, :columns] = source.values

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copies seats over others."""
        for layer in self.layers:
            layer.keys[targets] = layer.keys[sources]
            layer.values[targets] = layer.values[sources]

    def expect(self, positions: torch.Tensor, width: int) -> None:
        """Announces where the next token of every row goes, `positions` of shape `(rows,)`, all less than `width`."""
        self.positions, self.width = positions, width
        self.seats = torch.arange(len(positions), device=positions.device)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        layer, rows = self.layers[layer_idx], len(key_states)
        device = key_states.device  # a model may be spread over several
        place = (self.seats.to(device), slice(None), self.positions.to(device))
        layer.keys[place] = key_states.squeeze(2)
        layer.values[place] = value_states.squeeze(2)
        return layer.keys[:rows, :, : self.width], layer.values[:rows, :, : self.width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width - 1  # without the token that is on its way

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width, 0
