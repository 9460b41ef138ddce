"""Which channels lie side by side.

`api` is `permute`: the whole model at once. `trace` runs it and asks `rules` and `views` what each
operation does to the order of channels; `freedom` solves for what may change places; `swaps` looks
for a better order. `by_hand` does it for channels that the caller names.
"""
