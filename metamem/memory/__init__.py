"""Memories: modules with a state that they write and read, `forward(x, state) -> Out(y, state, aux)`.

- `base`           the protocol, and switching writes off
- `fast_weights`   a network whose weights an inner loop changes: what a user sees
- what is written: `level`, `signals`, `step_rule`, `transforms`; into what: `networks`, `module_network`
- what a token becomes: `writer`, `reader`, `projections`, `feature_maps`
- how it is computed: `chunkwise` for chunks of any network, `delta_rule` for exact token signals, `dual` for both;
  `recurrence` token by token, the reference; `routed` under a router
- `mnm`            Metalearned Neural Memory
- `slots`          memories of slots: DNC, NTM, SAM, …
- memories in a block or with a controller: `cell`, `gated_residual`, `context`, `persistent_tokens`
"""
