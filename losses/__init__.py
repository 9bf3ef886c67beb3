"""Objectives: pure functions `(pred, target) -> loss per token`.

A config names them by dotted path (`losses.recall.mse`), your own the same way (`mypackage.module.function`).
An objective `f` may have its gradient with respect to `pred` written out beside it as `f_gradient`; a memory
then needs no autograd inside its inner loop. Imports torch, einops and jaxtyping only.
"""

__project__ = "metamem-torch"  # tells this package from another that is called `losses`
