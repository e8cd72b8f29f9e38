"""fastres::update_running_stats_: the one op that writes running statistics, called once per forward in training."""

from __future__ import annotations

from fastres.ops import registration

op = registration.define(
    "update_running_stats_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, "
    "Tensor? num_batches_tracked, float momentum, SymInt count) -> ()",
    lambda *args: None,
)
