"""What checks annotations while tests run (pyproject.toml: --jaxtyping-packages): beartype, with 1 accepted as a float.

That is what PEP 484 and pyright say; beartype by itself refuses it.
"""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
